"""The feature of an image: what an extractor made of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Quantized:
    """Values as eight-bit levels: value = level * scale."""

    levels: npt.NDArray[np.int8]  # (R, D)
    scales: npt.NDArray[np.float32]  # (R, 1) or (1, D)

    def restore(self) -> npt.NDArray[np.float32]:
        """Returns the values (R, D), as a reader of the sidecar has them."""
        values: npt.NDArray[np.float32] = self.levels * self.scales
        return values


@dataclass(frozen=True)
class Projection:
    """What brings D values to K: how far they lie from a mean in K directions, each of length 1."""

    mean: npt.NDArray[np.float32]  # (D,)
    components: npt.NDArray[np.float32]  # (K, D)

    def project(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Maps (R, D) to (R, K)."""
        projected: npt.NDArray[np.float32] = (values - self.mean) @ self.components.T
        return projected

    def restore(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Maps (R, K) to the (R, D) nearest to what was projected."""
        restored: npt.NDArray[np.float32] = values.astype(np.float32) @ self.components + self.mean
        return restored


@dataclass(frozen=True)
class Feature:
    """What an extractor makes of one image: R regions or cells of D values.

    `parts` are further arrays whose first axis is R; a sidecar keeps each under its name:
    `labels` (R,) int32, `scores` (R,) float32, `classes` (R, C) distributions over C classes,
    `attribute.labels` and `attribute.scores` (R,) of published features.
    """

    values: npt.NDArray[Any]  # (R, D) as the model sees them
    boxes: npt.NDArray[np.float32] | None  # (R, 4) x1, y1, x2, y2 as fractions; None: the grid's
    parts: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    masks: "tuple[Mask, ...] | None" = None  # R of them
    quantized: Quantized | None = None  # what is stored instead of `values`
    projection: Projection | None = None  # that brought `values` to fewer dimensions

    def as_computed(self) -> npt.NDArray[Any]:
        """Returns the values of all dimensions, as near as what is stored comes to them."""
        return self.values if self.projection is None else self.projection.restore(self.values)

    @property
    def size_bytes(self) -> int:
        """The bytes of the stored arrays, without headers and padding."""
        arrays = [self.values] if self.quantized is None else [*vars(self.quantized).values()]
        arrays += [*self.parts.values(), *([] if self.boxes is None else [self.boxes])]
        return sum(array.nbytes for array in arrays) + sum(
            len(mask.counts) for mask in self.masks or ()
        )


@dataclass(frozen=True)
class Mask:
    """A region's outline in COCO's compressed run-length code, which pycocotools reads."""

    height: int  # of the raster, which covers the whole picture
    width: int
    counts: str
