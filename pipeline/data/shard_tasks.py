"""Shard plans to what comes of them, by plain functions under Ray, a bounded number at a time."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, TypeVar

from pipeline.data.ingest_plan import ShardPlan
from pipeline.data.sources.base import Source
from pipeline.errors import PipelineError
from pipeline.room import Waiting, wait

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
    running: list[Any] = [task.remote(plan, source_ref) for plan in first]
    try:
        while running:
            done = wait(running[:1] if in_order else running, waiting, has_begun)[0]
            has_begun = True
            running.remove(done)
            running += [task.remote(plan, source_ref) for plan in islice(plans, 1)]
            try:
                result: Result = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, PipelineError):
                    raise error.cause from error  # without Ray's traceback in its message
                raise
            yield result
    finally:
        for unfinished in running:
            ray.cancel(unfinished)
