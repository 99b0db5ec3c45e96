"""Shard plans to what comes of them, by plain functions under Ray, a bounded number at a time."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, TypeVar

from pipeline.data.ingest_plan import ShardPlan
from pipeline.data.sources.base import Source
from pipeline.errors import ClusterError, PipelineError
from pipeline.room import Waiting, require_cluster, wait

_RETRIES = 3  # for a lost worker or node; an error is not retried

Result = TypeVar("Result")


def run_tasks(
    work: Callable[[ShardPlan, Source], Result],
    plans: Iterator[ShardPlan],
    source: Source,
    bound: int,
    in_order: bool = False,
) -> Iterator[Result]:
    """Yields what `work` makes of each plan: as it is finished, or in the order of the plans.

    `bound` plans are in work at a time; with 0 the work is done here, without Ray. A PipelineError
    that `work` raises is raised here as itself.
    """
    if not bound:
        for plan in plans:
            yield work(plan, source)
        return
    first = list(islice(plans, bound))
    if not first:
        return
    import ray

    task = ray.remote(max_retries=_RETRIES)(work)
    source_ref = ray.put(source)  # one copy in the object store rather than one per Ray task
    waiting, has_begun = Waiting("ingest", 1, {"CPU": 1}), False
    running: dict[Any, ShardPlan] = {task.remote(plan, source_ref): plan for plan in first}
    try:
        while running:
            references = list(running)[:1] if in_order else list(running)
            done = wait(references, waiting, has_begun)[0]
            has_begun = True
            plan = running.pop(done)
            running |= {task.remote(later, source_ref): later for later in islice(plans, 1)}
            try:
                result: Result = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, PipelineError):
                    raise error.cause from error  # without Ray's traceback in its message
                if isinstance(error.cause, ModuleNotFoundError):
                    raise ClusterError(
                        f"ingest: {error.cause} on a node of the cluster; install Sightline and "
                        "what it needs on every node"
                    ) from error
                raise
            except ray.exceptions.RayError as error:
                require_cluster()
                raise ClusterError(_lost(plan)) from error
            yield result
    finally:
        for unfinished in running:
            ray.cancel(unfinished)


def _lost(plan: ShardPlan) -> str:
    keys = plan.records["key"]
    of = f"key {keys[0]}" if len(keys) == 1 else f"{len(keys)} keys from {keys[0]} to {keys[-1]}"
    return (
        f"ingest: the process that wrote a shard of split {plan.split} was lost {_RETRIES + 1} "
        f"times, with its node or by itself ({of}); if memory ran out, lower "
        "dataset.ingest.shards_in_flight; with samples_per_shard=1 the record is named"
    )
