"""The meter of a run: its rates from one logged line to the next."""

import math
import time
from typing import Any

from pipeline.training.tracking.step_figures import StepFigures


class Meter:
    """Adds up steps until a line is logged."""

    def __init__(self, peak_flops: float | None) -> None:
        """`peak_flops` are what all ranks' devices together can make in a second, if known."""
        self._peak_flops = peak_flops
        self._reset()

    def _reset(self) -> None:
        self._began = time.perf_counter()
        self._flops = 0.0
        self._num_samples = 0
        self._num_tokens = 0
        self._wait_seconds = 0.0

    def add(self, figures: StepFigures) -> None:
        """Counts a step."""
        self._num_samples += figures.num_samples
        self._num_tokens += figures.num_tokens
        self._flops += figures.flops
        self._wait_seconds += figures.wait_seconds

    def leave_out(self, seconds: float) -> None:
        """Takes out of the next line's rates what was not training."""
        self._began += seconds

    def line(self, step: int, figures: StepFigures, rate: float) -> dict[str, Any]:
        """Returns the line of a step: its own losses, and rates since the last line."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        line = {
            "step": step,
            "loss": figures.loss,
            "losses": figures.losses,
            "lr": rate,
            # none if fp16's loss scale was too high
            "grad_norm": figures.grad_norm if math.isfinite(figures.grad_norm) else None,
            "padding_fraction": 1 - figures.num_tokens / max(figures.num_tokens_with_padding, 1),
            "samples_per_second": round(self._num_samples / seconds, 3),
            "tokens_per_second": round(self._num_tokens / seconds, 3),
            "data_wait_fraction": round(self._wait_seconds / seconds, 4),
            "time": time.time(),
        }
        if self._peak_flops is not None:
            line["mfu"] = round(self._flops / seconds / self._peak_flops, 4)
        self._reset()
        return line
