"""Stage 3's swapped optimizer state, parameter by parameter, in memory while it is looked at."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class SwappedState:
    """What AdamW keeps of a stage 3 engine's parameters, one group of them at a time in memory.

    A group is what DeepSpeed updates at once, and what it swaps to files where it is asked to; a
    small one stays in memory. `release` must follow the last reading, before training goes on.
    """

    def __init__(self, optimizer: Any) -> None:
        """`optimizer` is DeepSpeed's; of another than stage 3's nothing may be asked."""
        self._optimizer = optimizer
        self._held: int | None = None
        self._is_changed = False
        self._swapper = getattr(optimizer, "optimizer_swapper", None)
        if self._swapper is not None:
            _clear_what_gradients_are_read_to(self._swapper.swap_buffer_manager)

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Inside, an update is made from the gradients of its own step, where they are in files.

        DeepSpeed would take a parameter's last ones if it has none in this step.
        """
        groups = [] if self._swapper is None else list(self._swapper.swap_params_info.values())
        for group in groups:
            if not group.has_gradients():  # one element, for it needs some
                group.unswapped_gradients[0] = torch.zeros(1)
        yield
        for group in groups:
            group.swapped_gradients.clear()
            group.unswapped_gradients.clear()

    def group_of(self, parameter: nn.Parameter) -> int:
        """Returns the group of a parameter, counted from 0; -1 for one that is not trained."""
        return self._location(parameter)[0] if parameter.requires_grad else -1

    def part(self, parameter: nn.Parameter, kind: str, changes: bool = False) -> Tensor:
        """Returns this rank's part of `weight`, or of a moment or average by name, flat.

        It is valid until another group's is asked for. What is written to it lasts with `changes`.
        """
        group, start, size = self._location(parameter)
        weights = self.hold(group, changes)
        whole = weights if kind == "weight" else self._optimizer.optimizer.state[weights][kind]
        part: Tensor = whole.detach().narrow(0, start, size)
        return part

    def hold(self, group: int, changes: bool = False) -> nn.Parameter:
        """Brings a group into memory; returns this rank's weights in it, one after another."""
        if group != self._held:
            self.release()
            if self._optimizer._swappable_optimizer_subgroup(group):
                self._optimizer._optimizer_states_and_gradient_swap_in(group)
            self._held = group
        self._is_changed = self._is_changed or changes
        weights: nn.Parameter = self._optimizer.fp32_partitioned_groups_flat[group]
        return weights

    def release(self) -> None:
        """Gives the memory back, once what has changed is written."""
        group, is_changed = self._held, self._is_changed
        self._held, self._is_changed = None, False
        if group is None or not self._optimizer._swappable_optimizer_subgroup(group):
            return
        if is_changed:
            self._optimizer._optimizer_states_and_gradient_swap_out(group)
        else:
            self._optimizer._release_swap_buffers(group)

    def _location(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        """Returns (group, first element, elements) of this rank's part."""
        location: tuple[int, int, int] = self._optimizer.grad_position[
            self._optimizer.get_param_id(parameter)
        ]
        return location


def _clear_what_gradients_are_read_to(buffers: Any) -> None:
    """Makes zero, in DeepSpeed's swap buffers, the gradient of a parameter that has none.

    It would be what the buffer was used for before. A group's gradients are read to the last of
    the buffers that are taken for it.
    """
    allocate = buffers.allocate

    def cleared(*arguments: Any, **named: Any) -> list[Tensor] | None:
        taken: list[Tensor] | None = allocate(*arguments, **named)
        if taken:
            taken[-1].zero_()
        return taken

    buffers.allocate = cleared
