import json

import numpy as np
import pytest

from pipeline.report.curves import (
    HEIGHT,
    WIDTH,
    Series,
    chart,
    extremes,
    running_mean,
    spread,
    ticks,
)


def series(values: list[float], first_step: int = 1) -> Series:
    steps = np.arange(first_step, first_step + len(values))
    return Series("mlm", "model", steps, np.array(values, np.float64))


def test_a_long_curve_keeps_its_spike_after_thinning() -> None:
    values = np.ones(50_000)
    values[31_337] = 9.0
    values[12_345] = -4.0

    kept = extremes(values, buckets=240)

    assert len(kept) <= 2 * 240 + 2
    assert {31_337, 12_345, 0, 49_999} <= set(kept.tolist())
    assert np.all(np.diff(kept) > 0)


def test_a_short_curve_is_not_thinned() -> None:
    assert extremes(np.arange(7.0), buckets=240).tolist() == list(range(7))


def test_the_running_mean_of_a_constant_is_that_constant_from_the_first_step() -> None:
    np.testing.assert_allclose(running_mean(np.full(300, 2.5)), 2.5)


def test_the_running_mean_never_leaves_the_range_of_its_values() -> None:
    values = np.random.default_rng(1).normal(size=500)
    means = running_mean(values)
    assert values.min() <= means.min()
    assert means.max() <= values.max()
    assert means.std() < values.std()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 7.9), (-3, 2e-4), (5, 5), (0, 0)])
def test_ticks_are_round_and_enclose_the_range(low: float, high: float) -> None:
    found = ticks(low, high, 4)
    assert found[0] <= low
    assert high <= found[-1]
    assert 2 <= len(found) <= 8
    np.testing.assert_allclose(np.diff(found), found[1] - found[0])


def test_spread_indices_hold_the_first_and_the_last_once_each() -> None:
    assert spread(5, 240).tolist() == [0, 1, 2, 3, 4]
    indices = spread(1000, 24).tolist()
    assert (indices[0], indices[-1], len(indices)) == (0, 999, 24)


def test_everything_drawn_lies_inside_the_drawing() -> None:
    drawn = chart("loss", [series([5.0, 3.0, -1.0, 0.5, 800.0])])
    for line in drawn.lines:
        for path in (line.raw, line.smooth):
            points = [point.split() for point in path[1:].split("L")]
            assert all(0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT for x, y in points)


def test_values_that_are_not_finite_are_counted_and_never_drawn() -> None:
    drawn = chart("loss", [series([3.0, float("nan"), float("inf"), 1.0])])
    assert drawn.note.startswith("2 values")
    assert "nan" not in drawn.lines[0].raw
    assert "inf" not in drawn.lines[0].smooth


def test_a_curve_of_one_step_and_one_of_none_can_be_drawn() -> None:
    assert chart("loss", [series([3.0])]).lines[0].last == "3.00"
    assert chart("loss", [series([float("nan")])]).lines == ()


def test_the_readout_gives_the_recorded_value_of_a_step_and_only_where_there_is_one() -> None:
    two = [series([4.0, 4.0, 4.0]), series([2.0], first_step=2)]
    points = json.loads(chart("loss", two).readout)
    assert [text for _, text in points] == [
        "step 1 · mlm 4.00",
        "step 2 · mlm 4.00 · mlm 2.00",
        "step 3 · mlm 4.00",
    ]
