"""The vectors of all ranks, with the gradient back to where each came from."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Returns this process's rank; 0 outside a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def gathered(local: Tensor) -> Tensor:
    """Maps (B, ...) of each of W ranks to (W * B, ...) in rank order, the same on every rank.

    Where no gradient is recorded, ranks may have other B.

    Collective, forward and backward. A vector's gradient is the sum of what all ranks ask of it:
    with each rank's loss a mean over its own samples, and gradients averaged over ranks as every
    data-parallel engine does, the update is that of the mean loss over the global batch.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    if not torch.is_grad_enabled():
        return _of_all_sizes(local)
    if not local.is_floating_point():
        return _of_all(local)
    result: Tensor = _Gather.apply(local)
    return result


def first_of_own(local: Tensor) -> int:
    """Returns where in `gathered(local)` this rank's own begin. Collective, as that is."""
    if torch.is_grad_enabled() or not dist.is_initialized():
        return rank() * len(local)
    return sum(_sizes(local)[: rank()])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.size = len(local)
        return _of_all(local)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        whole = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole)
        return whole[rank() * ctx.size :][: ctx.size]


def _of_all(local: Tensor) -> Tensor:
    local = local.contiguous()
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local)
    return torch.cat(parts)


def _sizes(local: Tensor) -> list[int]:
    sizes: list[int] = _of_all(torch.tensor([len(local)], device=local.device)).tolist()
    return sizes


def _of_all_sizes(local: Tensor) -> Tensor:
    sizes = _sizes(local)
    padded = local.new_zeros(max(sizes), *local.shape[1:])
    padded[: len(local)] = local
    parts = _of_all(padded).chunk(len(sizes))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
