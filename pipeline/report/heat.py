"""Attention maps, as the bytes from which a page draws them over a picture."""

import base64
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.report.examples import Attention


@dataclass(frozen=True)
class Heat:
    """M maps over R regions; each is scaled to its own peak in 255 steps. All fields are text."""

    maps: str  # base64 of uint8 (M, R)
    peaks: str  # M weights of the brightest region, comma-separated
    shares: str  # M sums over the regions, comma-separated
    grid: str  # "rows,columns", or empty if the regions are boxes
    boxes: str  # x1,y1,x2,y2 of each region, or of the whole grid, as fractions of the image


def attention_heat(attention: Attention) -> Heat:
    """Lays out M = (L + 1) x N maps, tokens fastest: the mean of all layers, then each layer."""
    weights = attention.weights
    maps = np.concatenate([weights.mean(axis=0, keepdims=True), weights])
    return heat(maps.reshape(-1, weights.shape[2]), attention.boxes, attention.grid)


def heat(
    maps: NDArray[np.float32], boxes: NDArray[np.float32], grid: tuple[int, int] | None
) -> Heat:
    """Packs maps (M, R) of weights >= 0 with the regions' boxes (R, 4)."""
    peaks = maps.max(axis=1)
    levels = np.round(255 * maps / np.where(peaks > 0, peaks, 1)[:, None]).astype(np.uint8)
    if grid is not None:
        boxes = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
    return Heat(
        maps=base64.b64encode(levels.tobytes()).decode("ascii"),
        peaks=_numbers(peaks),
        shares=_numbers(maps.sum(axis=1)),
        grid=f"{grid[0]},{grid[1]}" if grid else "",
        boxes=_numbers(boxes.reshape(-1)),
    )


def _numbers(values: NDArray[np.float32]) -> str:
    return ",".join(f"{value:.4g}" for value in values.tolist())
