"""Ray tasks over shard plans, a bounded number at a time."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.ingest.ingest_plan import ShardPlan
from pipeline.data.sources.base import Source
from pipeline.errors import ClusterError, PipelineError, ShardError
from pipeline.resources import Waiting, require_cluster, wait

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
    that `work` raises is raised here as itself. Raises ShardError naming the record that a worker
    died of again and again.
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
                if not isinstance(error, _lost_workers()):
                    first_line = str(error).strip().partition("\n")[0]
                    raise ClusterError(f"ingest: a shard's task was lost: {first_line}") from error
                raise _killed(plan, _deadly_record(task, plan, source_ref)) from error
            yield result
    finally:
        for unfinished in running:
            ray.cancel(unfinished)


def _lost_workers() -> tuple[type[Exception], ...]:
    """Returns what Ray raises of a task whose workers died, once it was retried."""
    from ray import exceptions

    return exceptions.WorkerCrashedError, exceptions.OutOfMemoryError, exceptions.NodeDiedError


def _deadly_record(task: Any, plan: ShardPlan, source_ref: Any) -> str:
    """Returns the key of a record that kills its worker again, or "" if no single one does.

    By halves: what is written meanwhile is listed nowhere.
    """
    import ray

    once = task.options(max_retries=0)

    def kills(records: pa.Table) -> bool:
        try:
            ray.get(once.remote(replace(plan, records=records), source_ref))
        except _lost_workers():
            return True
        except ray.exceptions.RayTaskError:  # an error is no death
            return False
        return False

    records = plan.records
    while records.num_rows > 1:
        middle = records.num_rows // 2
        first = records.slice(0, middle)
        records = first if kills(first) else records.slice(middle)
    return str(records["key"][0]) if records.num_rows and kills(records) else ""


def _killed(plan: ShardPlan, key: str) -> ShardError:
    deaths = f"a worker died {_RETRIES + 1} times at the same shard of {plan.split}"
    if key:
        row = plan.records.filter(pc.equal(plan.records["key"], key)).to_pylist()[0]
        return ShardError(
            f"{plan.url}: {deaths}: it dies of record {key!r}, {row['image']}, also alone. Take "
            "that image out of the source, or repair it, and run the same command again"
        )
    keys = plan.records["key"]
    return ShardError(
        f"{plan.url}: {deaths}, of {len(keys)} records from {keys[0]} to {keys[-1]}; no single one "
        "kills it. Is memory short? Lower dataset.ingest.shards_in_flight or samples_per_shard"
    )
