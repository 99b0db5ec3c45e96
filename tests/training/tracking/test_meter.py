from dataclasses import replace

import pytest

from pipeline.training.tracking.meter import Meter
from pipeline.training.tracking.step_figures import StepFigures

FIGURES = StepFigures(
    loss=0.5,
    losses={"mlm": 0.5},
    grad_norm=1.5,
    num_samples=8,
    num_tokens=60,
    num_tokens_with_padding=80,
    flops=1e3,
    wait_seconds=0.0,
    stop=False,
    lost=False,
    written=False,
    fault=None,
)


def test_a_line_has_the_rates_since_the_one_before_it() -> None:
    meter = Meter(peak_flops=1e6)
    for _ in range(3):
        meter.add(FIGURES)
    line = meter.line(3, FIGURES, rate=0.1)
    assert line["padding_fraction"] == 0.25
    assert line["tokens_per_second"] == pytest.approx(7.5 * line["samples_per_second"], rel=1e-3)
    assert line["mfu"] > 0
    assert meter.line(4, FIGURES, rate=0.1)["samples_per_second"] == 0


def test_a_norm_that_is_not_finite_is_no_number_and_unknown_devices_have_no_mfu() -> None:
    line = Meter(None).line(1, replace(FIGURES, grad_norm=float("inf")), rate=0.1)
    assert line["grad_norm"] is None
    assert "mfu" not in line
