"""Held-out figures, which tell a better model from a worse one."""

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from pipeline.errors import TrainingError
from pipeline.training.feed.micro_batch import MicroBatch
from pipeline.training.spec import RankContext

# Every rank calls it with the module in evaluation mode; what rank 0 returns is what counts.
Evaluate = Callable[[nn.Module, RankContext], Mapping[str, float]]


def held_out_losses(
    module: nn.Module, batches: Iterable[MicroBatch], rank_context: RankContext, num_passes: int
) -> dict[str, float]:
    """Returns the mean `loss`, and that of each objective, over the samples of all ranks.

    Collective: each rank gives its own part of the samples, in at least one batch and at most
    `num_passes`, which are those of the rank that has most.
    """
    dtype = next(module.parameters()).dtype
    device = torch.device(rank_context.device)
    totals: dict[str, torch.Tensor] = {}
    num_samples = made = 0
    for batch in batches:
        moved = batch.to(device, dtype)
        loss, parts = module(moved)
        made += 1
        num_samples += batch.num_samples
        for name, mean in {"loss": loss, **parts}.items():
            total = totals.get(name, torch.zeros((), dtype=torch.float64, device=device))
            totals[name] = total + mean.double() * batch.num_samples
    if not totals:
        raise TrainingError(f"rank {rank_context.rank}: it has no held-out samples to evaluate on")
    for _ in range(num_passes - made):  # for nothing: ZeRO stage 3 gathers the weights for each
        module(moved)
    names = sorted(totals)
    sums = torch.stack([*(totals[name] for name in names), torch.tensor(num_samples).to(loss)])
    dist.all_reduce(sums)
    means = (sums[:-1] / sums[-1]).tolist()
    return dict(zip(names, means, strict=True))
