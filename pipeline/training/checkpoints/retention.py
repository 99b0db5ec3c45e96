"""Checkpoint retention: which of a run's published checkpoints have expired."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.training.config import TrainingConfig

SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Published:
    """A published checkpoint as retention sees it."""

    step: int
    written: float  # seconds since 1970
    figure: float | None  # `best_by` of the evaluation after its step, if there was one


def expired(checkpoints: Iterable[Published], config: TrainingConfig) -> list[int]:
    """Returns the steps, in rising order, of the checkpoints that no rule of the config retains."""
    rising = sorted(checkpoints, key=lambda kept: kept.step)
    wanted = {kept.step for kept in rising[-config.checkpoints.keep_last :]}
    wanted.update(_best(rising, config))
    if config.checkpoints.keep_every_steps is not None:
        wanted.update(
            kept.step for kept in rising if kept.step % config.checkpoints.keep_every_steps == 0
        )
    if config.checkpoints.keep_every_hours is not None:
        wanted.update(_spaced(rising, config.checkpoints.keep_every_hours * SECONDS_PER_HOUR))
    return [kept.step for kept in rising if kept.step not in wanted]


def _best(rising: Sequence[Published], config: TrainingConfig) -> list[int]:
    """The best few by their evaluations; the model that is written may come from the best."""
    count = max(config.checkpoints.keep_best, int(config.evaluation.restore_best))
    sign = 1 if config.evaluation.best_is == "lowest" else -1
    evaluated = [
        (sign * kept.figure, kept.step)
        for kept in rising
        if kept.figure is not None and math.isfinite(kept.figure)
    ]
    return [step for _, step in sorted(evaluated)[:count]]


def _spaced(rising: Sequence[Published], seconds: float) -> list[int]:
    """The first, and then each that was written long enough after the one chosen before it."""
    chosen: list[Published] = []
    for kept in rising:
        if not chosen or kept.written - chosen[-1].written >= seconds:
            chosen.append(kept)
    return [kept.step for kept in chosen]
