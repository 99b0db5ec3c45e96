"""CPUs and GPUs of this machine that stages ask for."""

import os
from collections.abc import Iterator, Sequence

from pipeline.recipe import Recipe
from pipeline.stages.state import Record


def missing_devices(recipe: Recipe, stages: Sequence[str]) -> Iterator[str]:
    """Says what stages that are not done ask of this machine, and it has not."""
    cluster, extract = recipe.cluster, recipe.features.extract
    if cluster.address is not None:  # which may have more, or may wait for it
        return
    if "extract" in stages and not recipe.features.live:
        cpus = max(os.cpu_count() or 1, cluster.workers * cluster.cpus_per_worker)
        if extract.actors and cluster.runner == "ray" and extract.cpus_per_actor > cpus:
            yield (
                f"features.extract.cpus_per_actor: found {extract.cpus_per_actor:g}, and this "
                f"machine has {cpus} CPUs; use fewer, or give the cluster.address of one with more"
            )
        if extract.gpus_per_actor and (here := _num_gpus()) < extract.gpus_per_actor:
            yield (
                f"features.extract.gpus_per_actor: found {extract.gpus_per_actor:g}, and this "
                f"machine has {here} GPUs; use 0, or give the cluster.address of one that has some"
            )
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", cluster.workers))  # set by torchrun
    wanted = ranks_here * cluster.gpus_per_worker
    trains = {"pretrain", "finetune"} & set(stages)
    if wanted and any(not _is_done(recipe, stage) for stage in trains):
        here = _num_gpus()
        if here < wanted:
            yield (
                f"cluster.gpus_per_worker: {ranks_here} workers want {wanted} GPUs, and this "
                f"machine has {here}; use 0 or fewer workers, or give the address of a cluster"
            )


def _is_done(recipe: Recipe, stage: str) -> bool:
    record = Record.read(recipe.run, stage)
    return record is not None and record.state == "done"


def _num_gpus() -> int:
    import torch  # which takes seconds to import, and is needed for this only here

    return torch.cuda.device_count()
