"""One loss and its gradient, computed on any number of ranks, each a process of its own."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from pipeline.objectives.stream import ObjectiveModel
from tests.objectives.tiny import collated, make_batch, make_family, make_objectives, make_tokenizer

NUM_SAMPLES = 6


def contrast(size: int, first: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the mean contrastive loss of a rank's samples, and its gradient by parameter."""
    tokenizer: Any = make_tokenizer()
    objectives = make_objectives(itc={})
    model = make_family("late_fusion", len(tokenizer))
    batch = collated(objectives, tokenizer, make_batch(size, first=first))
    loss, _ = ObjectiveModel(model, objectives)(batch)
    loss.backward()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return loss.detach(), gradients


def contrast_on(num_ranks: int, folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns loss and gradient averaged over ranks that share a global batch of six."""
    start_processes(_of_rank, (num_ranks, str(folder)), nprocs=num_ranks)  # type: ignore[no-untyped-call]
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(num_ranks)]
    gradients = {
        name: torch.stack([gradient[name] for _, gradient in ranks]).mean(0) for name in ranks[0][1]
    }
    return torch.stack([loss for loss, _ in ranks]).mean(), gradients


@torch.no_grad()
def judged(size: int, first: int) -> Tensor:
    """Returns the contrastive loss of each of a rank's samples, without a gradient."""
    tokenizer: Any = make_tokenizer()
    objectives = make_objectives(itc={})
    model = make_family("late_fusion", len(tokenizer))
    batch = collated(objectives, tokenizer, make_batch(size, first=first))
    stream = batch.streams["captions-full-intact"]
    encoded = model.encode(stream.inputs)
    return objectives[0].loss(model, encoded, stream.inputs, stream.targets["itc"])


def judge_on(rank: int, sizes: tuple[int, ...], folder: str) -> None:
    """Leaves what a rank finds of its samples, which are as many as `sizes` says."""
    _join(rank, len(sizes), folder)
    torch.save(judged(sizes[rank], sum(sizes[:rank])), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def _join(rank: int, num_ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks
    )


def _of_rank(rank: int, num_ranks: int, folder: str) -> None:
    _join(rank, num_ranks, folder)
    size = NUM_SAMPLES // num_ranks
    torch.save(contrast(size, rank * size), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
