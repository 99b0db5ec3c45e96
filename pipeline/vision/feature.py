"""The interface of an extractor: features of prepared images, and what must hold for them."""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.errors import FeatureError
from pipeline.vision.preprocess.image import Prepared

LIBRARIES = ("numpy", "pillow", "simplejpeg", "torch", "torchvision")

# How far a feature may move with the batch it was computed in: |a - b| / (|a| + RMS of all).
# Two roundings to float16 that fall on different sides differ by 2^-10 of the value itself.
INVARIANCE_TOLERANCE = 2e-3


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


class Extractor(Protocol):
    """A frozen network with its preprocessing and selection rule, or none at all (`pixels`)."""

    @property
    def name(self) -> str:
        """The folder under `features/`: the type and the beginning of the identity."""
        ...

    def card(self) -> dict[str, Any]:
        """What made the features, as plain data from which `from_card` builds the same again."""
        ...

    def prepare(self, image: bytes) -> Prepared:
        """Decodes and preprocesses one image on the CPU.

        FeatureError is of this image, of which no feature can be made; ConfigError of any.
        """
        ...

    def extract(self, prepared: Sequence[Prepared]) -> list[Feature]:
        """Returns one feature per image, each of which depends on its own image only."""
        ...

    def exact(self) -> "Extractor":
        """Returns the extractor with values as computed, to which stored ones are compared."""
        ...


def identity(
    kind: str,
    weights_digest: str | None,
    preprocessing: Sequence[Mapping[str, Any]],
    selection: Mapping[str, Any],
    storage: Mapping[str, Any],
) -> str:
    """Returns the hash of all that a feature depends on besides its image.

    Where the weights lay, the batch size, the device and the versions of libraries are not in
    it: the card records them, and features agree across them up to rounding.
    """
    parts = {
        "type": kind,
        "weights": weights_digest,
        "preprocessing": list(preprocessing),
        "selection": dict(selection),
        "storage": dict(storage),
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


def wrapped_identity(inner: str, kind: str, rule: Mapping[str, Any]) -> str:
    """Returns the hash of an extractor that does more to another one's features, by a rule."""
    parts = {"of": inner, kind: dict(rule)}
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


def part_layout(dtype: str, *shape: int | str) -> dict[str, Any]:
    """Returns how the card describes an array beside the values; "R" is the number of regions."""
    return {"dtype": dtype, "shape": list(shape)}


def extractor_name(kind: str, identity: str) -> str:
    """Returns the folder name of an extractor."""
    return f"{kind}-{identity[:8]}"


def environment(device: str, *more_libraries: str) -> dict[str, Any]:
    """Returns what may move the last digit of a feature: the device and the libraries."""
    names = (*LIBRARIES, *more_libraries)
    return {
        "device": device,
        "libraries": {name: importlib.metadata.version(name) for name in names},
    }


def measure_invariance(extractor: Extractor, prepared: Sequence[Prepared]) -> dict[str, Any]:
    """Compares each image's feature alone, in one batch of all, and in the reversed batch.

    Returns the largest difference, as the card states it. Raises FeatureError above
    INVARIANCE_TOLERANCE: what shares a batch must not reach a feature.
    """
    together = extractor.extract(prepared)
    reverse = extractor.extract(prepared[::-1])[::-1]
    alone = [extractor.extract([image])[0] for image in prepared]
    difference = max(
        max(_difference(reference, other) for other in others)
        for reference, *others in zip(alone, together, reverse, strict=True)
    )
    if difference > INVARIANCE_TOLERANCE:
        raise FeatureError(
            f"{extractor.name}: a feature moved by {difference:.2g} of its size with the batch it "
            f"was computed in; at most {INVARIANCE_TOLERANCE:g} is rounding. Does the network "
            "contain a layer that mixes the images of a batch?"
        )
    return {
        "images": len(prepared),
        "largest_difference": difference,
        "tolerance": INVARIANCE_TOLERANCE,
        "measure": "|a - b| / (|a| + RMS), alone against in a batch",
    }


def _difference(reference: Feature, other: Feature) -> float:
    if reference.values.shape != other.values.shape:
        return float("inf")  # another selection of regions
    a, b = reference.values.astype(np.float64), other.values.astype(np.float64)
    size = np.abs(a) + np.sqrt(np.mean(a**2)) if a.size else np.ones_like(a)
    moved = float(np.max(np.abs(a - b) / np.maximum(size, np.finfo(np.float32).tiny), initial=0.0))
    if reference.boxes is None or other.boxes is None:
        return moved
    return max(moved, float(np.abs(reference.boxes - other.boxes).max(initial=0.0)))
