from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import numpy as np
import pytest

from pipeline.data.read.extractor_card import ExtractorCard
from pipeline.errors import FeatureError
from pipeline.vision.extractor import measure_invariance
from pipeline.vision.feature import Feature
from pipeline.vision.preprocess.image import Prepared
from tests.data.cards import make_card


def prepared(count: int) -> list[Prepared]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 4, 3, 3), np.uint8)
    return [Prepared(image, (0.0, 0.0, 1.0, 1.0)) for image in pixels]


class MeanExtractor:
    """Mean colours, from which `share` of the batch's mean is taken away."""

    name = "mean-00000000"

    def __init__(self, share: float) -> None:
        self._share = share

    def card(self) -> ExtractorCard:
        return make_card()

    def prepare(self, image: bytes) -> Prepared:
        raise NotImplementedError

    def extract(self, prepared: Sequence[Prepared]) -> list[Feature]:
        means = np.stack([image.pixels.mean(axis=(0, 1)) for image in prepared])
        values = means - self._share * means.mean(axis=0)
        return [Feature(row[None].astype(np.float32), None) for row in values]

    def exact(self) -> Self:
        return self


class DriftingBoxes(MeanExtractor):
    """Mean colours in a box that is larger the more images are in the batch."""

    def extract(self, prepared: Sequence[Prepared]) -> list[Feature]:
        box = np.array([[0, 0, 0.1 * len(prepared), 1]], np.float32)
        return [replace(feature, boxes=box) for feature in super().extract(prepared)]


def test_feature_of_its_own_image_alone_is_invariant() -> None:
    assert measure_invariance(MeanExtractor(0.0), prepared(3)).largest_difference == 0


def test_statistics_of_a_batch_in_a_feature_are_found_out() -> None:
    with pytest.raises(FeatureError, match="with the batch it was computed in"):
        measure_invariance(MeanExtractor(0.1), prepared(3))


def test_a_box_that_moves_with_the_batch_is_found_out() -> None:
    with pytest.raises(FeatureError, match="with the batch it was computed in"):
        measure_invariance(DriftingBoxes(0.0), prepared(3))
