"""The figures of a phase: its metrics.jsonl as series that can be drawn."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.report.curves import Role, Series
from pipeline.training.tracking.metrics_log import Recorded, Stretch


@dataclass(frozen=True, eq=False)
class PhaseMetrics:
    """The figures of one phase, by step; a step recorded twice keeps its last line."""

    phase: str
    steps: NDArray[np.int64]
    records: tuple[Mapping[str, Any], ...]
    is_cut_short: bool  # the last line was only half written
    stretches: tuple[Stretch, ...] = ()

    @classmethod
    def read(cls, run: str, phase: str) -> Self:
        """Reads RUN/<phase>/metrics.jsonl; raises StorageError naming a line that is damaged."""
        recorded = Recorded.read(storage.join(run, phase))
        by_step = {line["step"]: line for line in recorded.steps}
        steps = sorted(by_step)
        return cls(
            phase=phase,
            steps=np.array(steps, np.int64),
            records=tuple(by_step[step] for step in steps),
            is_cut_short=recorded.is_cut_short,
            stretches=recorded.stretches,
        )

    def objectives(self) -> list[str]:
        """Returns the names in `losses`, in the order of their first appearance."""
        return list(dict.fromkeys(name for line in self.records for name in line.get("losses", {})))

    def loss(self, objective: str, label: str, role: Role) -> Series:
        return self._series(label, role, lambda line: line.get("losses", {}).get(objective))

    def value(self, name: str, label: str, role: Role, scale: float = 1.0) -> Series:
        series = self._series(label, role, lambda line: line.get(name))
        return Series(label, role, series.steps, series.values * scale)

    def _series(self, label: str, role: Role, pick: Callable[[Mapping[str, Any]], Any]) -> Series:
        picked = [pick(line) for line in self.records]
        kept = [index for index, value in enumerate(picked) if value is not None]
        values = np.array([picked[index] for index in kept], np.float64)
        return Series(label, role, self.steps[kept], values)

    def has(self, name: str) -> bool:
        return any(line.get(name) is not None for line in self.records)
