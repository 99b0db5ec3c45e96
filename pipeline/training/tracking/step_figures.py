"""The figures of a step over all ranks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from pipeline.training.feed.micro_batch import MicroBatch


@dataclass(frozen=True)
class StepFigures:
    """What all ranks did in one step, known to all of them."""

    loss: float
    losses: dict[str, float]
    grad_norm: float  # infinite if no update was made
    num_samples: int
    num_tokens: int
    num_tokens_with_padding: int  # tokens, regions and their padding
    flops: float  # that encoding took, forward and backward; 0 if nobody asks
    wait_seconds: float  # for data, averaged over ranks
    stop: bool
    lost: bool  # the folder is another process's by now
    written: bool  # the checkpoint under way is on every rank's disk
    fault: str | None  # the figure that is not finite, and on which rank


@dataclass(frozen=True)
class RankFigures:
    """What a rank knows of a step beside its losses."""

    num_samples: int
    num_tokens: int
    num_tokens_with_padding: int
    flops: float
    wait_seconds: float
    stop: bool
    lost: bool
    written: bool

    @classmethod
    def of(
        cls,
        micro_batches: Sequence[MicroBatch],
        *,
        flops: float,
        wait_seconds: float,
        stop: bool,
        lost: bool,
        written: bool,
    ) -> "RankFigures":
        """Counts what is in the rank's micro-batches."""
        return cls(
            num_samples=sum(batch.num_samples for batch in micro_batches),
            num_tokens=sum(batch.num_tokens for batch in micro_batches),
            num_tokens_with_padding=sum(batch.num_tokens_with_padding for batch in micro_batches),
            flops=flops,
            wait_seconds=wait_seconds,
            stop=stop,
            lost=lost,
            written=written,
        )


def gather(
    losses: Sequence[tuple[Tensor, Mapping[str, Tensor]]],
    shares: Sequence[float],
    norm: float,
    mine: RankFigures,
    can_lower_loss_scale: bool,
) -> StepFigures:
    """Tells every rank what all of them did: collective.

    `losses` are those of the rank's micro-batches, and `shares` what each counts for in the mean.
    A norm that is not finite is no fault where the next step's loss scale is lower.
    """
    names = sorted(losses[0][1])
    found = torch.stack(
        [torch.stack([loss, *(parts[name] for name in names)]) for loss, parts in losses]
    ).double()
    means = found.new_tensor(shares) @ found
    row = torch.cat([means, means.new_tensor(list(vars(mine).values()))])
    ranks = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, row)
    table = torch.stack(ranks).cpu().numpy()  # (rank, figure)
    average = table.mean(axis=0)
    sums = dict(zip(vars(mine), table[:, len(names) + 1 :].sum(axis=0).tolist(), strict=True))
    return StepFigures(
        loss=float(average[0]),
        losses={name: float(mean) for name, mean in zip(names, average[1:], strict=False)},
        grad_norm=norm,
        num_samples=int(sums["num_samples"]),
        num_tokens=int(sums["num_tokens"]),
        num_tokens_with_padding=int(sums["num_tokens_with_padding"]),
        flops=sums["flops"],
        wait_seconds=sums["wait_seconds"] / len(table),
        stop=bool(sums["stop"]),
        lost=bool(sums["lost"]),
        written=int(sums["written"]) == len(table),
        fault=_fault(["loss", *names], table, norm, can_lower_loss_scale),
    )


def _fault(
    names: Sequence[str], table: NDArray[np.float64], norm: float, can_lower_loss_scale: bool
) -> str | None:
    for rank, row in enumerate(table):
        for name, value in zip(names, row, strict=False):
            if not math.isfinite(value):
                return f"rank {rank}: {name} is {value}"
    if math.isfinite(norm) or can_lower_loss_scale:
        return None
    return f"the gradient's norm is {norm}"
