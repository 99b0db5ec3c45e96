"""The counters of a run at a step, kept in each checkpoint beside tensors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from pipeline.errors import ConfigError
from pipeline.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run's counts after a step. Every rank has the same."""

    skipped: int = 0  # steps whose update is not in the weights
    skips_in_a_row: int = 0  # steps up to this one that were not finite
    roll_backs: int = 0
    evaluation: dict[str, float] = field(default_factory=dict)  # of this very step, if there is one
    best: float | None = None  # the best evaluation's figure, and its step
    best_step: int | None = None
    evaluations_since_best: int = 0
    loss_scale: dict[str, float] | None = None  # the state of fp16's

    def after_update(self) -> Self:
        """Returns the state after a step whose figures were finite."""
        return replace(self, skips_in_a_row=0, evaluation={})

    def after_skip(self) -> Self:
        """Returns the state after a step that made no update since it was not finite."""
        return replace(self, skips_in_a_row=self.skips_in_a_row + 1, evaluation={})

    def in_new_stretch(self, is_comparable: bool) -> Self:
        """Returns the state with which a run goes on with other settings.

        Waiting for a better evaluation begins anew; and so does looking for the best, unless later
        figures can be compared with earlier ones.
        """
        if is_comparable:
            return replace(self, evaluations_since_best=0)
        return replace(self, evaluations_since_best=0, best=None, best_step=None)

    def after_evaluation(
        self, step: int, found: Mapping[str, float], config: TrainingConfig
    ) -> Self:
        """Returns the state with an evaluation; ConfigError if `best_by` is none of its figures.

        A figure that is not finite is never better.
        """
        if config.evaluation.best_by not in found:
            raise ConfigError(
                f"training.evaluation.best_by: found {config.evaluation.best_by!r}, but an "
                f"evaluation gives {', '.join(sorted(found))}"
            )
        figure = found[config.evaluation.best_by]
        sign = 1 if config.evaluation.best_is == "lowest" else -1
        better = math.isfinite(figure) and (self.best is None or sign * (figure - self.best) < 0)
        if better:
            return replace(
                self, evaluation=dict(found), best=figure, best_step=step, evaluations_since_best=0
            )
        waited = self.evaluations_since_best + 1
        return replace(self, evaluation=dict(found), evaluations_since_best=waited)

    def is_best(self, step: int) -> bool:
        """Whether no earlier evaluation was as good as this step's."""
        return self.best_step == step

    def is_patience_spent(self, config: TrainingConfig) -> bool:
        """Whether so many evaluations have brought no better one that the run is to end."""
        return (
            config.evaluation.patience is not None
            and self.evaluations_since_best >= config.evaluation.patience
        )
