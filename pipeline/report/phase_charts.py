"""The charts of a run's phases."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.report.curves import Chart, Role, chart
from pipeline.report.phase_metrics import PhaseMetrics
from pipeline.report.titles import OBJECTIVES, PHASES
from pipeline.training.tracking.metrics_log import Stretch

SMALL_CHARTS = (
    ("lr", "Learning rate", "", 1.0, False),
    ("samples_per_second", "Samples per second", "", 1.0, True),
    ("data_wait_fraction", "Waiting for data", "%", 100.0, True),
    ("grad_norm", "Gradient norm", "", 1.0, True),
)


@dataclass(frozen=True)
class PhaseCharts:
    title: str
    about: str
    losses: tuple[Chart, ...]
    small: tuple[Chart, ...]
    stretches: tuple[Stretch, ...]


def phase_charts(phases: Mapping[str, PhaseMetrics]) -> list[PhaseCharts]:
    """Makes the charts; the twin's losses are drawn into those of fine-tuning, if there are any."""
    blind = phases.get("blind")
    groups = []
    for name, metrics in phases.items():
        if name == "blind" and "finetune" in phases:
            continue
        twin = blind if name == "finetune" else None
        role: Role = "blind" if name == "blind" else "model"
        objectives = list(dict.fromkeys(metrics.objectives() + (twin.objectives() if twin else [])))
        losses = []
        for objective in objectives:
            series = [metrics.loss(objective, "model", role)]
            if twin:
                series.append(twin.loss(objective, "blind twin", "blind"))
            title = f"Loss: {OBJECTIVES.get(objective, objective)}"
            losses.append(chart(title, series, stretches=metrics.stretches))
        if len(objectives) != 1 and metrics.has("loss"):
            series = [metrics.value("loss", "model", role)]
            if twin:
                series.append(twin.value("loss", "blind twin", "blind"))
            losses.append(chart("Loss: total", series, stretches=metrics.stretches))
        small = [
            chart(
                title,
                [metrics.value(key, title, role, scale)],
                unit=unit,
                from_zero=from_zero,
                smooth=key != "lr",
                stretches=metrics.stretches,
            )
            for key, title, unit, scale, from_zero in SMALL_CHARTS
            if metrics.has(key)
        ]
        about = f"{len(metrics.steps):,} steps recorded"
        if twin:
            about += f", and {len(twin.steps):,} of the blind twin"
        shown = PhaseCharts(PHASES[name], about, tuple(losses), tuple(small), metrics.stretches)
        groups.append(shown)
    return groups
