"""Training curves: series of values by step, thinned, smoothed, and laid out as SVG paths."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.training.tracking.metrics_log import Stretch

Role = Literal["model", "blind"]

WIDTH, HEIGHT = 400, 190  # the drawing's own units, about one CSS pixel each
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 24
RAW_BUCKETS = 240  # each keeps its lowest and its highest value
SMOOTH_POINTS = 240
READOUT_POINTS = 120
SMOOTHING_FRACTION = 1 / 30  # the running mean's span as a part of the whole curve

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Series:
    """One value per recorded step."""

    label: str
    role: Role
    steps: NDArray[np.int64]  # (N,), increasing
    values: Floats  # (N,), as recorded: may hold nan or infinity


@dataclass(frozen=True)
class Line:
    """A series as it is drawn. `raw` and `smooth` are SVG path data."""

    label: str
    role: Role
    raw: str
    smooth: str
    last: str  # the smoothed value at the end, as text


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """Everything a template needs to draw one figure."""

    title: str
    description: str  # what the figure shows, for those who cannot see it
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    readout: str  # JSON [[x, text], …] for the pointer and the arrow keys
    note: str  # what is not in the drawing, e.g. values that are not finite
    marks: tuple[Tick, ...] = ()  # steps after which the run has other settings


def chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    from_zero: bool = False,
    smooth: bool = True,
    stretches: Sequence[Stretch] = (),
) -> Chart:
    """Lays out one figure with one line per series, and a mark where a stretch begins.

    A raw curve of many steps keeps the lowest and the highest value of each of 240 stretches, so
    that no spike is lost; the smooth one is a running mean over all steps, thinned afterwards.
    """
    finite = [_finite(one) for one in series]
    dropped = sum(one.values.size for one in series) - sum(one.values.size for one in finite)
    note = f"{dropped} values were not finite and are left out." if dropped else ""
    smoothed = [running_mean(one.values) if smooth else one.values for one in finite]
    shown = [one.values for one in finite if one.values.size]
    if not shown:
        return Chart(title, f"{title}: no finite value was recorded.", (), (), (), "[]", note)
    x_range = (
        float(min(one.steps[0] for one in finite if one.steps.size)),
        float(max(one.steps[-1] for one in finite if one.steps.size)),
    )
    y_ticks = ticks(*_span(np.concatenate(shown), from_zero), 4)
    y_range = (y_ticks[0], y_ticks[-1])
    place = _Scale(x_range, y_range)
    lines = []
    for one, mean in zip(finite, smoothed, strict=True):
        if not one.values.size:
            continue
        kept = extremes(one.values, RAW_BUCKETS)
        even = spread(one.values.size, SMOOTH_POINTS)
        lines.append(
            Line(
                label=one.label,
                role=one.role,
                raw=place.path(one.steps[kept], one.values[kept]) if smooth else "",
                smooth=place.path(one.steps[even], mean[even]),
                last=_text(float(mean[-1])) + unit,
            )
        )
    return Chart(
        title=title,
        description=_describe(title, finite, smoothed, unit),
        lines=tuple(lines),
        x_ticks=tuple(
            Tick(round(place.x(at), 1), f"{at:,.0f}")
            for at in ticks(*x_range, 4)
            if x_range[0] <= at <= x_range[1] and at == round(at)
        ),
        y_ticks=tuple(Tick(round(place.y(at), 1), _tick_text(at)) for at in y_ticks),
        readout=_readout(finite, smoothed, place, unit, smooth),
        note=note,
        marks=tuple(
            Tick(round(place.x(one.step), 1), f"after step {one.step:,}: {one.described()}")
            for one in stretches
            if x_range[0] <= one.step <= x_range[1]
        ),
    )


def running_mean(values: Floats) -> Floats:
    """Returns the exponential running mean, corrected for its start so that it has no lag there."""
    span = max(1.0, values.size * SMOOTHING_FRACTION)
    keep = 1 - 2 / (span + 1)
    means = np.empty_like(values)
    total = weight = 0.0
    for index, value in enumerate(values):
        total = keep * total + value
        weight = keep * weight + 1
        means[index] = total / weight
    return means


def extremes(values: Floats, buckets: int) -> NDArray[np.int64]:
    """Returns the indices of each bucket's lowest and highest value, increasing; all if few."""
    if values.size <= 2 * buckets:
        return np.arange(values.size)
    edges = np.linspace(0, values.size, buckets + 1).astype(np.int64)
    kept = {0, values.size - 1}
    for start, stop in itertools.pairwise(edges):
        kept.add(int(start + values[start:stop].argmin()))
        kept.add(int(start + values[start:stop].argmax()))
    return np.array(sorted(kept), np.int64)


def spread(count: int, points: int) -> NDArray[np.int64]:
    """Returns at most `points` indices spread evenly over `count`, first and last included."""
    return np.unique(np.linspace(0, count - 1, min(count, points)).round().astype(np.int64))


def ticks(low: float, high: float, count: int) -> list[float]:
    """Returns about `count` round numbers that enclose the range [low, high]."""
    if high <= low:
        low, high = low - abs(low or 1.0) / 2, low + abs(low or 1.0) / 2
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


@dataclass(frozen=True)
class _Scale:
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, step: float) -> float:
        low, high = self.x_range
        return LEFT + (step - low) / ((high - low) or 1.0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def path(self, steps: NDArray[np.int64], values: Floats) -> str:
        points = [
            f"{self.x(step):.1f} {self.y(value):.1f}"
            for step, value in zip(steps.tolist(), values.tolist(), strict=True)
        ]
        if len(points) == 1:
            points *= 2  # a round line cap makes a dot of it
        return "M" + "L".join(points)


def _finite(series: Series) -> Series:
    keep = np.isfinite(series.values)
    return Series(series.label, series.role, series.steps[keep], series.values[keep])


def _span(values: Floats, from_zero: bool) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if from_zero or 0 < low < 0.4 * high:
        low = min(low, 0.0)
    return low, high


def _describe(title: str, series: Sequence[Series], means: Sequence[Floats], unit: str) -> str:
    parts = [
        f"{one.label} goes from {_text(float(mean[0]))}{unit} to {_text(float(mean[-1]))}{unit} "
        f"between steps {one.steps[0]:,} and {one.steps[-1]:,}"
        for one, mean in zip(series, means, strict=True)
        if one.steps.size
    ]
    return f"{title}: {'; '.join(parts)}."


def _readout(
    series: Sequence[Series], means: Sequence[Floats], place: _Scale, unit: str, smooth: bool
) -> str:
    longest = max(series, key=lambda one: one.steps.size)
    points = []
    for step in longest.steps[spread(longest.steps.size, READOUT_POINTS)].tolist():
        parts = [f"step {step:,}"]
        for one, mean in zip(series, means, strict=True):
            at = int(np.searchsorted(one.steps, step))
            if at == one.steps.size or one.steps[at] != step:
                continue
            name = f"{one.label} " if len(series) > 1 else ""
            raw = f" (raw {_text(float(one.values[at]))})" if smooth and not name else ""
            parts.append(f"{name}{_text(float(mean[at]))}{unit}{raw}")
        points.append([round(place.x(step), 1), " · ".join(parts)])
    return json.dumps(points, ensure_ascii=False, separators=(",", ":"))


def _text(value: float) -> str:
    """Writes a number with about three digits that matter."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.0f}"
    if size >= 0.01:
        return f"{value:.{2 if size >= 1 else 3}f}" if size < 10 else f"{value:.1f}"
    return f"{value:.1e}".replace("e-0", "e-")


def _tick_text(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) < 0.001:
        return f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")
    return f"{value:,.10g}" if abs(value) < 1e5 else f"{value:.3g}"
