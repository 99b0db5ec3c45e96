"""Failures of ranks, each told in one sentence."""

from typing import Any

from pipeline import ray_2_60, storage
from pipeline.errors import PipelineError, TrainingError
from pipeline.training.spec import TrainingSpec


def refusal(failures: dict[int, Any]) -> PipelineError | None:
    """Returns the error of our own among the ranks' failures, with the rank in front."""
    for rank, failure in sorted(failures.items()):
        cause = ray_2_60.cause_of(failure)
        if isinstance(cause, PipelineError):
            return type(cause)(f"rank {rank}: {cause}")
    return None


def in_one_sentence(error: Exception, spec: TrainingSpec) -> PipelineError:
    """Says what ended a Ray Train run; the whole trace goes into the run's folder."""
    cause = getattr(error, "controller_failure", error)
    if isinstance(cause, PipelineError):
        return cause
    failures = getattr(error, "worker_failures", {})
    refused = refusal(failures)
    if refused is not None:
        return refused
    trace = storage.join(spec.folder, "failure.txt")
    storage.write_bytes(trace, str(error).encode())
    reasons = [
        f"rank {rank}: {_last_line(failure)}" for rank, failure in sorted(failures.items())
    ] or [f"the process that leads the ranks: {_last_line(cause)}"]
    return TrainingError(f"{spec.phase}: {'; '.join(reasons)}; the whole trace is in {trace}")


def _last_line(error: Any) -> str:
    from ray.exceptions import OutOfMemoryError, RayActorError

    if isinstance(error, OutOfMemoryError):
        return (
            "its machine's memory ran out, so Ray killed processes; free some, or use fewer "
            "cluster.workers or a smaller micro_batch_size, and start again: it goes on"
        )
    cause = ray_2_60.cause_of(error)
    if isinstance(cause, RayActorError):
        return (
            "lost, with its node or by itself, and not to be restarted (cluster.max_failures); "
            "start again: it goes on from the last checkpoint"
        )
    if isinstance(cause, ModuleNotFoundError):
        return f"{cause} on its node; install Sightline and what it needs on every node"
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {text[-1]}" if text else type(cause).__name__
