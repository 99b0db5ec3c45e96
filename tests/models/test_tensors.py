from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.models.inputs import Inputs
from pipeline.models.tensors import mapped


@dataclass(frozen=True)
class Nest:
    own: Tensor
    absent: Tensor | None
    by_name: Mapping[str, "Nest | Tensor"]
    count: int = 3


def test_every_tensor_is_mapped_and_nothing_else_is_changed() -> None:
    inner = Nest(torch.tensor([2]), None, {}, count=5)
    nest = Nest(torch.tensor([1]), None, {"inner": inner, "plain": torch.tensor([4])})
    doubled = mapped(nest, lambda tensor: 2 * tensor)
    assert isinstance(doubled.by_name["inner"], Nest)
    found = [doubled.own, doubled.by_name["inner"].own, doubled.by_name["plain"]]
    assert [int(tensor) for tensor in found if isinstance(tensor, Tensor)] == [2, 4, 8]
    assert (doubled.count, doubled.by_name["inner"].count) == (3, 5)
    assert doubled.absent is doubled.by_name["inner"].absent is None
    assert int(nest.own) == 1


def test_inputs_are_moved_whole() -> None:
    empty = torch.zeros(1, 2)
    inputs = Inputs(empty.long(), empty.bool(), empty, empty, empty.bool())
    there = inputs.to("meta")
    assert there.masked_regions is None
    moved = [value for value in vars(there).values() if value is not None]
    assert len(moved) == 5
    assert {tensor.device.type for tensor in moved} == {"meta"}
