"""Counting by shapes, against torch's own counter watching the whole model run."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models import families
from pipeline.perf import flops
from pipeline.perf.model import lxmert_config, visualbert_config
from pipeline.perf.training_step import MASKED_PER_TEXT, TrainingBatch, our_loss

LENGTHS, REGIONS = [9, 9, 9], 7


@pytest.mark.parametrize("family", ["visualbert", "lxmert"])
def test_a_batch_without_padding_costs_what_torch_counts(family: str) -> None:
    config = visualbert_config("tiny") if family == "visualbert" else lxmert_config("tiny")
    model = families.build(config)
    batch = TrainingBatch.draw(config, LENGTHS, 9, REGIONS, torch.device("cpu"), torch.float32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        our_loss(model)(batch)
    counted = 3 * counter.get_total_flops()
    assert flops.step_flops(config, LENGTHS, REGIONS, MASKED_PER_TEXT) == counted


def test_padding_is_not_counted_and_longer_texts_are() -> None:
    config = visualbert_config("base")
    one, two = (flops.step_flops(config, [length], 36, 2) for length in (10, 20))
    assert one < two
    assert flops.step_flops(config, [10, 20], 36, 2) == one + two


def test_a_base_sized_step_is_about_six_operations_for_each_weight_and_place() -> None:
    encoder = 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    found = flops.step_flops(visualbert_config("base"), [32], 36, 0)
    assert found == pytest.approx(6 * encoder * 68, rel=0.06)
