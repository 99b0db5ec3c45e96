"""The range of the pictures that a model was trained on, by which one unlike any of them is told.

A few figures of each of some pictures of a split, from the smallest to the largest. They go with a
trained model; a picture outside of them is answered all the same, but not without saying so.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from pipeline.data.media.image_file import BadImageError, opened
from pipeline.data.read.dataset import Split
from pipeline.data.read.features import FeatureBatch

NUM_PICTURES = 64  # looked at, evenly over the split
# How far beyond the range a figure may lie: a share of its width, or, of sizes, a factor.
MARGIN = 0.5
SIZE_FACTOR = 2.0

_SIZES = ("width", "height")
_SAID = {
    "regions": "regions",
    "level": "its features' mean",
    "contrast": "its features' deviation",
    "texture": "its features' deviation from region to region",
    "width": "pixels of width",
    "height": "pixels of height",
}


@dataclass(frozen=True)
class PictureRange:
    """The smallest and the largest of each figure, and whether colours were among them."""

    num_pictures: int
    ranges: Mapping[str, tuple[float, float]]
    any_colour: bool

    @classmethod
    def of(cls, split: Split) -> Self:
        """Looks at some pictures of a split that was opened with features."""
        count = min(NUM_PICTURES, split.num_samples)
        rows = np.unique(np.linspace(0, split.num_samples - 1, count).astype(np.int64))
        figures: dict[str, list[float]] = {}
        any_colour = False
        for row in rows.tolist():
            payload = split.image(row)
            shape = _shape(payload)
            any_colour = any_colour or shape is None or shape[2]
            for name, value in _figures(split.features([row]), shape).items():
                figures.setdefault(name, []).append(value)
        ranges = {name: (min(values), max(values)) for name, values in figures.items()}
        return cls(len(rows), ranges, any_colour)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        ranges = {
            name: (float(low), float(high)) for name, (low, high) in document["ranges"].items()
        }
        return cls(int(document["num_pictures"]), ranges, bool(document["any_colour"]))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def unlike(self, features: FeatureBatch, payload: bytes) -> list[str]:
        """Says in what one picture, given by its features and its file, is unlike all of them."""
        shape = _shape(payload)
        told = []
        for name, value in _figures(features, shape).items():
            if name not in self.ranges:
                continue
            low, high = self.ranges[name]
            if name in _SIZES:
                is_outside = value * SIZE_FACTOR < low or value > SIZE_FACTOR * high
            else:
                spare = MARGIN * (high - low)
                is_outside = not low - spare <= value <= high + spare
            if is_outside:
                told.append(f"{value:.4g} {_SAID[name]}, in training {low:.4g} to {high:.4g}")
        if shape is not None and shape[2] and not self.any_colour:
            told.append("in colour, in training all grey")
        return told


def _figures(features: FeatureBatch, shape: tuple[int, int, bool] | None) -> dict[str, float]:
    """Returns the figures of one picture."""
    count = int(features.num_regions[0])
    seen = features.values[0, :count] if features.pixels is None else features.pixels[0]
    values = seen.astype(np.float32) / (255 if seen.dtype == np.uint8 else 1)
    found = {"regions": float(count)}
    if values.size:
        found |= {"level": float(values.mean()), "contrast": float(values.std())}
        if features.pixels is None:
            found["texture"] = float(values.std(axis=0).mean())
    if shape is not None:
        found |= {"width": float(shape[0]), "height": float(shape[1])}
    return found


def _shape(payload: bytes) -> tuple[int, int, bool] | None:
    """Returns a picture's width, height and whether it may have colours; None of another medium."""
    try:
        with opened(payload) as image:
            return image.width, image.height, image.mode not in ("1", "L", "LA", "I", "I;16")
    except BadImageError:
        return None
