"""The phases of a launch, one after another on a rank, and how they ended."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.training.spec import RankContext, TrainingResult, TrainingSpec

if TYPE_CHECKING:
    from pipeline.training.assembly import Assembly

Assembled = Callable[[TrainingSpec], "Assembly"]


def train_each(
    specs: Sequence[TrainingSpec], rank_context: RankContext, assembled: Assembled | None
) -> list[TrainingResult]:
    from pipeline.training.assembly import assemble
    from pipeline.training.loop import train

    results = []
    for spec in specs:
        results.append(train(spec, rank_context, assembled or assemble))
        if results[-1].state == "stopped":
            break
    return results


def results_of(specs: Sequence[TrainingSpec], finished_before: set[str]) -> list[TrainingResult]:
    """Reads how phases ended from their folders, up to the first that was stopped."""
    from pipeline.training.result import finished_result
    from pipeline.training.tracking.metrics_log import last_loss, read_events

    results = []
    for spec in specs:
        result = finished_result(spec)
        if result is None:
            stops = [event for event in read_events(spec.folder) if event["event"] == "stopped"]
            step, steps = stops[-1]["step"], spec.training.steps
            results.append(TrainingResult("stopped", step, steps, last_loss(spec.folder), None))
            break
        results.append(replace(result, already_finished=spec.folder in finished_before))
    return results


def timeout_seconds(specs: Sequence[TrainingSpec]) -> int:
    """Returns how long a rank waits for the others in any of the phases."""
    return max(spec.training.timeout_seconds for spec in specs)
