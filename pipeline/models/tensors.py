"""A map over every tensor of a batch, wherever in it the tensor is."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

Nested = TypeVar("Nested")


def mapped(value: Nested, function: Callable[[Tensor], Tensor]) -> Nested:
    """Returns dataclasses and mappings, in one another, with `function` of each of their tensors.

    What is neither of these nor a tensor, such as the None of an absent field, stays as it is.
    """
    changed: Any = value
    if isinstance(value, Tensor):
        changed = function(value)
    elif isinstance(value, Mapping):
        changed = {name: mapped(below, function) for name, below in value.items()}
    elif is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        changed = replace(value, **{name: mapped(getattr(value, name), function) for name in names})
    result: Nested = changed
    return result
