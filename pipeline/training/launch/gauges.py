"""Prometheus gauges of a run's newest figures, through Ray's own metrics."""

from typing import Any

from pipeline.training.launch.followers import Progress

_GAUGES = {
    "step": "Updates done",
    "loss": "Loss of the last logged step, over the global batch",
    "lr": "Learning rate",
    "grad_norm": "Norm of the gradient before clipping",
    "samples_per_second": "Samples trained on, over all ranks",
    "tokens_per_second": "Real tokens and regions trained on, over all ranks",
    "step_seconds": "Time from one step to the next",
    "data_wait_fraction": "Share of the time in which ranks waited for data",
    "mfu": "Share of the devices' best rate of computing that the encoder made use of",
}


def gauges(run: str) -> Progress:
    """Returns what sets the gauges of a run from the lines that its phases log."""
    from ray.util.metrics import Gauge

    by_name = {
        name: Gauge(f"sightline_training_{name}", description, tag_keys=("run", "phase"))
        for name, description in _GAUGES.items()
    }
    last: dict[str, dict[str, Any]] = {}

    def set_gauges(line: dict[str, Any]) -> None:
        if "loss" not in line:
            return
        phase = line["phase"]
        before, last[phase] = last.get(phase), line
        figures = dict(line)
        if before is not None and line["step"] > before["step"]:
            steps = line["step"] - before["step"]
            figures["step_seconds"] = (line["time"] - before["time"]) / steps
        for name, gauge in by_name.items():
            if name in figures:
                gauge.set(figures[name], tags={"run": run, "phase": phase})

    return set_gauges
