"""DeepSpeed 0.19's private hooks: each is what this release has no public way for.

No other module reaches into DeepSpeed. With another release each of them must be read anew, which
`tests/training/engine/test_deepspeed_0_19.py` asks for. `engine` and `optimizer` are those that
`deepspeed.initialize` returned.
"""

import importlib
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VERSION = "0.19.8"


def import_deepspeed(device: str) -> Any:
    """Imports DeepSpeed for a device: quietly, and without compiling anything at start."""
    if not device.startswith("cuda"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed calls collectives by names that torch has renamed, at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is dep", FutureWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime"
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed fills this table when it is first read, by compiling and linking test programs,
    # and then builds shared-memory collectives (a minute, once per machine). gloo needs neither.
    deepspeed.ops.__compatible_ops__ = {}
    # Its Muon optimizer, which it loads to tell that ours is another, is decorated with
    # torch.compile, and loading that compiler takes two seconds of every start.
    from deepspeed.runtime import compiler

    compile_now = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_now
    return deepspeed


def async_io_builder() -> Any:
    """Returns what compiles DeepSpeed's file I/O. That it can be loaded early is not public."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder()


def go_on_at_smallest_scale(optimizer: Any) -> None:
    """Keeps fp16's loss scaler from ending the process where it can scale no lower."""
    optimizer.loss_scaler.raise_error_at_min_scale = False


def set_steps_done(engine: Any, step: int) -> None:
    """Has an engine count on from a step; publicly only its own checkpoints do so."""
    engine.global_steps = step


def link_moments(optimizer: Any) -> None:
    """Makes stages 1 and 2 find each parameter's moments in their flat partitions.

    DeepSpeed does so once, after the first group's first update, when the groups after it have no
    moments yet.
    """
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()


def refresh_low_precision(optimizer: Any) -> None:
    """Rounds stages 1's and 2's fp32 weights into those of the forward pass, as an update does."""
    optimizer.update_lp_params()


def gather(optimizer: Any, parameter: nn.Parameter, part: Tensor) -> Tensor:
    """Returns a tensor of a parameter of stage 3, whole, from the parts that its ranks have.

    The public getters fail for what is in swap files.
    """
    whole: Tensor = optimizer._fp32_state_allgather(parameter, part)
    return whole


def part_size(parameter: nn.Parameter) -> int:
    """Returns how many elements of a parameter each rank has in stage 3, with padding.

    The public setter of whole tensors forgets that the parts are padded to be equal.
    """
    return int(parameter.ds_tensor.numel())  # type: ignore[attr-defined]


def groups(optimizer: Any) -> list[nn.Parameter]:
    """Returns stage 3's groups, each flat: what it updates, and swaps, at once."""
    found: list[nn.Parameter] = optimizer.fp32_partitioned_groups_flat
    return found


def position(optimizer: Any, parameter: nn.Parameter) -> tuple[int, int, int]:
    """Returns (group, first element, elements) of this rank's part of a parameter of stage 3."""
    found: tuple[int, int, int] = optimizer.grad_position[optimizer.get_param_id(parameter)]
    return found


def is_swapped(optimizer: Any, group: int) -> bool:
    """Tells whether a group of stage 3 is in swap files between updates: small ones are not."""
    return bool(optimizer._swappable_optimizer_subgroup(group))


def swap_in(optimizer: Any, group: int) -> None:
    """Reads a group into memory. Publicly only an update does."""
    optimizer._optimizer_states_and_gradient_swap_in(group)


def swap_out(optimizer: Any, group: int) -> None:
    """Writes a group that `swap_in` has read, and gives its memory back."""
    optimizer._optimizer_states_and_gradient_swap_out(group)


def drop(optimizer: Any, group: int) -> None:
    """Gives the memory of a group back that `swap_in` has read, and writes nothing."""
    optimizer._release_swap_buffers(group)


def fill_missing_gradients(optimizer: Any) -> Callable[[], None]:
    """Gives each swapped group a gradient for the next update; returns what forgets it afterwards.

    DeepSpeed would take the last one of a parameter that has none in this step.
    """
    swapper = getattr(optimizer, "optimizer_swapper", None)
    swapped = [] if swapper is None else list(swapper.swap_params_info.values())
    for group in swapped:
        if not group.has_gradients():  # one element, for it needs some
            group.unswapped_gradients[0] = torch.zeros(1)

    def forget() -> None:
        for group in swapped:
            group.swapped_gradients.clear()
            group.unswapped_gradients.clear()

    return forget


def clear_gradient_buffers(optimizer: Any) -> None:
    """Makes zero, in DeepSpeed's swap buffers, the gradient of a parameter that has none.

    It would be what the buffer was used for before. A group's gradients are read to the last of
    the buffers that are taken for it.
    """
    swapper = getattr(optimizer, "optimizer_swapper", None)
    if swapper is None:
        return
    buffers = swapper.swap_buffer_manager
    allocate = buffers.allocate

    def cleared(*arguments: Any, **named: Any) -> list[Tensor] | None:
        taken: list[Tensor] | None = allocate(*arguments, **named)
        if taken:
            taken[-1].zero_()
        return taken

    buffers.allocate = cleared
