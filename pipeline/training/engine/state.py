"""The training state that DeepSpeed holds of a module, read and written in whole fp32 tensors.

It is told in tensors that know no ZeRO stage and no world size: for each parameter its fp32 weight
and AdamW's two moments, whole, by name. The names are `weight/<parameter>`,
`exp_avg/<parameter>`, `exp_avg_sq/<parameter>`, `buffer/<buffer>` and, where a moving average is
kept, `average/<parameter>`.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.training.engine import deepspeed_0_19
from pipeline.training.engine.optimizer import EMA_WEIGHTS, MOMENTS
from pipeline.training.engine.swapped_state import SwappedState

ReadTensor = Callable[[str], Tensor]


class TrainingState:
    """The weights and what AdamW keeps of each: all but `updating` is collective."""

    def __init__(self, engine: Any, stage: int, kinds: Sequence[str], device: torch.device) -> None:
        """`engine` is DeepSpeed's at a ZeRO stage; `kinds` are those of `optimizer.state_kinds`."""
        self._module: nn.Module = engine.module
        self._optimizer = engine.optimizer
        self._adamw: torch.optim.Optimizer = engine.basic_optimizer
        self._stage = stage
        self._kinds = kinds
        self._device = device
        self._swapped = SwappedState(engine.optimizer)

    def updating(self) -> contextlib.AbstractContextManager[None]:
        """Inside, an update is made."""
        return self._swapped.updating()

    def make(self, updates: int) -> None:
        """Gives AdamW the state that it would make at its first update, `updates` of them done."""
        with self._access():
            for partition in self._partitions():
                self._adamw.state[partition] = {
                    "step": torch.tensor(float(updates), device=partition.device),
                    **{moment: torch.zeros_like(partition) for moment in MOMENTS},
                }
                if EMA_WEIGHTS in self._kinds:
                    self._adamw.state[partition][EMA_WEIGHTS] = partition.detach().clone()

    def restore(self, restored: ReadTensor) -> None:
        """Writes the tensors that `tensors` gave, by name."""
        self._link_moments()
        with self._access():
            for name, parameter in self._parameters():
                if parameter.requires_grad:
                    for kind in ("weight", *self._kinds):
                        self._set(parameter, kind, restored(f"{kind}/{name}"))
        if self._stage in (1, 2):
            deepspeed_0_19.refresh_low_precision(self._optimizer)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every tensor of the state, whole and in fp32, in the same order on every rank.

        A yielded tensor is valid until the next one is asked for; keep a copy, not the tensor.
        """
        self._link_moments()
        with self._access():
            for name, parameter in self._parameters():
                yield f"weight/{name}", self._weight(parameter)
                if parameter.requires_grad:
                    for kind in self._kinds:
                        yield f"{kind}/{name}", self._kept(parameter, kind)
        for name, buffer in _persistent_buffers(self._module):
            yield f"buffer/{name}", buffer.detach()

    def weights(self, ema: bool = False) -> dict[str, Tensor]:
        """Returns the module's state dict in fp32 on the CPU; every rank calls, rank 0 keeps it.

        `ema` gives the weights' moving average. Other ranks get an empty dict.
        """
        self._link_moments()
        weights = {}
        with self._access():
            for name, parameter in self._parameters():
                if ema and parameter.requires_grad:
                    weight = self._kept(parameter, EMA_WEIGHTS)
                else:
                    weight = self._weight(parameter)
                if torch.distributed.get_rank() == 0:
                    weights[name] = weight.detach().cpu().clone()
        if torch.distributed.get_rank() == 0:
            for name, buffer in _persistent_buffers(self._module):
                weights[name] = buffer.detach().cpu().clone()
        return weights

    @contextlib.contextmanager
    def using_ema_weights(self) -> Iterator[None]:
        """Puts the moving average into the weights that the forward pass reads."""
        from deepspeed import zero

        self._link_moments()
        trainable = [parameter for _, parameter in self._parameters() if parameter.requires_grad]
        if self._stage < 3:
            before = [parameter.detach().clone() for parameter in trainable]
            for parameter in trainable:
                parameter.copy_(self._kept(parameter, EMA_WEIGHTS))
            try:
                yield
            finally:
                for parameter, weight in zip(trainable, before, strict=True):
                    parameter.copy_(weight)
            return

        def fill(read: Callable[[nn.Parameter], Tensor]) -> None:
            with self._access():
                for parameter in trainable:
                    whole = read(parameter)
                    with zero.GatheredParameters([parameter], modifier_rank=0):
                        parameter.copy_(whole)

        fill(lambda parameter: self._kept(parameter, EMA_WEIGHTS))
        try:
            yield
        finally:
            fill(self._weight)  # the low-precision copies are these, rounded

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Returns the parameters by name, those together that are swapped in together."""
        named = list(self._module.named_parameters())
        if self._stage < 3:
            return named
        return sorted(named, key=lambda item: self._swapped.group_of(item[1]))

    @contextlib.contextmanager
    def _access(self) -> Iterator[None]:
        """Lets stage 3's state be read, and written; training goes on after it."""
        try:
            yield
        finally:
            if self._stage == 3:
                self._swapped.release()

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed import zero
        from deepspeed.utils import safe_get_full_fp32_param

        if self._stage == 3:
            if parameter.requires_grad:
                return self._whole(parameter, "weight")
            with zero.GatheredParameters([parameter]):
                return parameter.detach().float().clone()
        if not parameter.requires_grad or self._stage == 0:
            return parameter.detach().float()
        whole: Tensor = safe_get_full_fp32_param(parameter)
        return whole.detach()

    def _kept(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """Returns a moment or the moving average of a parameter, whole."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if self._stage == 3:
            return self._whole(parameter, kind)
        if self._stage == 0:
            kept: Tensor = self._adamw.state[parameter][kind]
            return kept.detach()
        whole: Tensor = safe_get_full_optimizer_state(parameter, kind)
        return whole.detach()

    def _whole(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """Gathers what stage 3 has of a parameter from all ranks."""
        part = self._swapped.part(parameter, kind)
        return deepspeed_0_19.gather(self._optimizer, parameter, part)

    def _partitions(self) -> Iterator[nn.Parameter]:
        """Yields what AdamW updates; of stage 3 one is in memory, to be written, at a time."""
        if self._stage == 3:
            for index in range(len(deepspeed_0_19.groups(self._optimizer))):
                yield self._swapped.hold(index, changes=True)
        else:
            for group in self._adamw.param_groups:
                yield from group["params"]

    def _link_moments(self) -> None:
        if self._stage in (1, 2):
            deepspeed_0_19.link_moments(self._optimizer)

    def _set(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        """Writes this rank's part of a whole fp32 tensor."""
        from deepspeed import utils

        value = value.to(self._device)
        if self._stage == 0:
            if kind != "weight":
                self._adamw.state[parameter][kind].copy_(value)
        elif self._stage == 3:
            size = deepspeed_0_19.part_size(parameter)
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
            padded = nn.functional.pad(value.flatten(), (0, size * world_size - value.numel()))
            mine = padded.narrow(0, rank * size, size)
            self._swapped.part(parameter, kind, changes=True).copy_(mine)
        elif kind == "weight":
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, kind)


def load(module: nn.Module, restored: ReadTensor) -> None:
    """Copies the weights and buffers of a state into a module that no engine holds yet."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(restored(f"weight/{name}"))
        for name, buffer in _persistent_buffers(module):
            buffer.copy_(restored(f"buffer/{name}"))


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    kept = module.state_dict(keep_vars=True)
    for name, buffer in module.named_buffers():
        if name in kept:
            yield name, buffer
