"""Prepared images to features: what every extractor is, and what must hold for its output."""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.errors import FeatureError
from pipeline.vision.image import Prepared

LIBRARIES = ("numpy", "pillow", "simplejpeg", "torch", "torchvision")

# How far a feature may move with the batch it was computed in: |a - b| / (|a| + RMS of all).
# Two roundings to float16 that fall on different sides differ by 2^-10 of the value itself.
INVARIANCE_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Feature:
    """What an extractor makes of one image: R regions or cells of D values."""

    values: npt.NDArray[Any]  # (R, D) in the dtype it is stored in
    boxes: npt.NDArray[np.float32] | None  # (R, 4) x1, y1, x2, y2 as fractions; None: the grid's


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
        """Decodes and preprocesses one image on the CPU; FeatureError if it is no image."""
        ...

    def extract(self, prepared: Sequence[Prepared]) -> list[Feature]:
        """Returns one feature per image, each of which depends on its own image only."""
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


def extractor_name(kind: str, identity: str) -> str:
    """Returns the folder name of an extractor."""
    return f"{kind}-{identity[:8]}"


def environment(device: str) -> dict[str, Any]:
    """Returns what may move the last digit of a feature: the device and the libraries."""
    return {
        "device": device,
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
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
    size = np.abs(a) + np.sqrt(np.mean(a**2))
    return float(np.max(np.abs(a - b) / np.maximum(size, np.finfo(np.float32).tiny), initial=0.0))
