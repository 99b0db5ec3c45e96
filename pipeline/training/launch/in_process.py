"""Ranks without Ray: this process, or those that torchrun has started."""

import atexit
import os
from collections.abc import Sequence
from datetime import timedelta

from pipeline.cluster import ClusterConfig
from pipeline.errors import ConfigError
from pipeline.training.launch.phases import Assembled, timeout_seconds, train_each
from pipeline.training.spec import RankContext, TrainingResult, TrainingSpec


def run_in_process(
    specs: Sequence[TrainingSpec], cluster: ClusterConfig, assembled: Assembled | None
) -> list[TrainingResult]:
    """Trains the phases on the rank that this process is."""
    import torch
    import torch.distributed as dist

    rank, world_size, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if world_size != cluster.workers:
        raise ConfigError(
            f"cluster.workers: found {cluster.workers}, but runner=process has {world_size} "
            "process(es); set workers to that, start as many with torchrun, or use runner=ray"
        )
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads its device from it
    device = "cpu"
    if cluster.gpus_per_worker:
        if not torch.cuda.is_available():
            raise ConfigError("cluster.gpus_per_worker: found 1, but torch sees no GPU here; use 0")
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        store = None
        if world_size == 1:  # alone, it needs no port
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(
            "nccl" if cluster.gpus_per_worker else "gloo",
            store=store,
            rank=rank if store else -1,
            world_size=world_size if store else -1,
            timeout=timedelta(seconds=timeout_seconds(specs)),
        )
        # Not before: DeepSpeed remembers the group, and later phases of a command use it again.
        atexit.register(dist.destroy_process_group)
    return train_each(specs, RankContext(rank, world_size, local_rank, device), assembled)
