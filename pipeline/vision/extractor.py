"""The interface of an extractor: features of prepared images, each of its own image alone."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from pipeline.data.read.extractor_card import BatchInvariance, ExtractorCard
from pipeline.errors import FeatureError
from pipeline.vision.feature import Feature
from pipeline.vision.preprocess.image import Prepared

# How far a feature may move with the batch it was computed in: |a - b| / (|a| + RMS of all).
# Two roundings to float16 that fall on different sides differ by 2^-10 of the value itself.
INVARIANCE_TOLERANCE = 2e-3


class Extractor(Protocol):
    """A frozen network with its preprocessing and selection rule, or none at all (`pixels`)."""

    @property
    def name(self) -> str:
        """The folder under `features/`: the type and the beginning of the identity."""
        ...

    def card(self) -> ExtractorCard:
        """What made the features, from which `from_card` builds the same again."""
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


def measure_invariance(extractor: Extractor, prepared: Sequence[Prepared]) -> BatchInvariance:
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
    return BatchInvariance(
        images=len(prepared),
        largest_difference=difference,
        tolerance=INVARIANCE_TOLERANCE,
        measure="|a - b| / (|a| + RMS), alone against in a batch",
    )


def _difference(reference: Feature, other: Feature) -> float:
    if reference.values.shape != other.values.shape:
        return float("inf")  # another selection of regions
    a, b = reference.values.astype(np.float64), other.values.astype(np.float64)
    size = np.abs(a) + np.sqrt(np.mean(a**2)) if a.size else np.ones_like(a)
    moved = float(np.max(np.abs(a - b) / np.maximum(size, np.finfo(np.float32).tiny), initial=0.0))
    if reference.boxes is None or other.boxes is None:
        return moved
    return max(moved, float(np.abs(reference.boxes - other.boxes).max(initial=0.0)))
