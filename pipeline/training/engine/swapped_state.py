"""Stage 3's swapped optimizer state, parameter by parameter, in memory while it is read."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from pipeline.training.engine import deepspeed_0_19


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
        deepspeed_0_19.clear_gradient_buffers(optimizer)

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Inside, an update is made from the gradients of its own step, where they are in files."""
        forget = deepspeed_0_19.fill_missing_gradients(self._optimizer)
        yield
        forget()

    def group_of(self, parameter: nn.Parameter) -> int:
        """Returns the group of a parameter, counted from 0; -1 for one that is not trained."""
        if not parameter.requires_grad:
            return -1
        return deepspeed_0_19.position(self._optimizer, parameter)[0]

    def part(self, parameter: nn.Parameter, kind: str, changes: bool = False) -> Tensor:
        """Returns this rank's part of `weight`, or of a moment or average by name, flat.

        It is valid until another group's is asked for. What is written to it lasts with `changes`.
        """
        group, start, size = deepspeed_0_19.position(self._optimizer, parameter)
        weights = self.hold(group, changes)
        whole = weights if kind == "weight" else self._optimizer.optimizer.state[weights][kind]
        part: Tensor = whole.detach().narrow(0, start, size)
        return part

    def hold(self, group: int, changes: bool = False) -> nn.Parameter:
        """Brings a group into memory; returns this rank's weights in it, one after another."""
        if group != self._held:
            self.release()
            if deepspeed_0_19.is_swapped(self._optimizer, group):
                deepspeed_0_19.swap_in(self._optimizer, group)
            self._held = group
        self._is_changed = self._is_changed or changes
        return deepspeed_0_19.groups(self._optimizer)[group]

    def release(self) -> None:
        """Gives the memory back, once what has changed is written."""
        group, is_changed = self._held, self._is_changed
        self._held, self._is_changed = None, False
        if group is None or not deepspeed_0_19.is_swapped(self._optimizer, group):
            return
        if is_changed:
            deepspeed_0_19.swap_out(self._optimizer, group)
        else:
            deepspeed_0_19.drop(self._optimizer, group)
