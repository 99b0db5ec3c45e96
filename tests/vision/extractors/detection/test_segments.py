from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from pipeline.data.read.extractor_card import ExtractorCard
from pipeline.vision.extractor import Extractor, measure_invariance
from pipeline.vision.extractors.detection.segments import (
    SegmentsConfig,
    mask_pooled,
    run_length_masks,
)
from pipeline.vision.extractors.registry import from_card
from pipeline.vision.feature import Mask

SMALL = SegmentsConfig(
    network="maskrcnn_resnet50_fpn",
    weights="random",
    num_classes=4,
    short_side=64,
    long_side=96,
    num_proposals=20,
    min_regions=5,
    max_regions=5,
    mask_side=60,
)


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return SMALL.build()


def bits(mask: Mask) -> np.ndarray:
    found: np.ndarray = coco.decode({"size": [mask.height, mask.width], "counts": mask.counts})
    return found


def test_every_region_of_a_photograph_has_a_mask_within_its_box(
    extractor: Extractor, photographs: list[Path]
) -> None:
    prepared = [extractor.prepare(path.read_bytes()) for path in photographs[:3]]
    for image, feature in zip(prepared, extractor.extract(prepared), strict=True):
        assert feature.values.shape == (5, 1024 + 256)
        assert feature.masks is not None
        assert feature.boxes is not None
        assert len(feature.masks) == 5
        for mask, box in zip(feature.masks, feature.boxes, strict=True):
            assert max(mask.height, mask.width) == 60
            height, width = image.pixels.shape[:2]
            assert abs(mask.height / mask.width - height / width) < 0.02
            rows, columns = np.nonzero(bits(mask))
            if len(rows):
                x1, y1, x2, y2 = box * [mask.width, mask.height, mask.width, mask.height]
                assert x1 - 2 <= columns.min() <= columns.max() <= x2 + 2
                assert y1 - 2 <= rows.min() <= rows.max() <= y2 + 2
    assert measure_invariance(extractor, prepared).largest_difference == 0


def test_outlines_are_of_the_whole_picture_at_the_stated_size() -> None:
    masks = torch.zeros(2, 1, 28, 28)
    masks[0] = 1
    masks[1, :, :, 14:] = 0.9  # its right half
    boxes = torch.tensor([[0.0, 0.0, 40.0, 80.0], [20.0, 40.0, 40.0, 80.0]])
    whole, half = run_length_masks(masks, boxes, size=(80, 40), side=40)
    assert (whole.height, whole.width) == (half.height, half.width) == (40, 20)
    assert bits(whole).mean() > 0.9
    rows, columns = np.nonzero(bits(half))
    assert columns.min() >= 14
    assert rows.min() >= 19
    assert 80 <= len(rows) <= 120


def test_a_mask_pooled_feature_is_the_mean_of_what_the_mask_covers() -> None:
    maps = torch.arange(3 * 2 * 4 * 4, dtype=torch.float32).view(3, 2, 4, 4)  # R=3, C=2, H=W=4
    masks = torch.zeros(3, 1, 8, 8)
    masks[0, :, :2, :2] = 1  # the first cell
    masks[1] = 0.25
    found = mask_pooled(maps, masks)
    torch.testing.assert_close(found[0], maps[0, :, 0, 0])
    torch.testing.assert_close(found[1], maps[1].mean(dim=(1, 2)))
    assert not found[2].any()  # an empty mask


@pytest.mark.slow
@pytest.mark.parametrize(("pool", "dim"), [("box", 1024), ("mask", 256), ("both", 1280)])
def test_the_pool_says_how_wide_features_are(
    pool: Any, dim: int, extractor: Extractor, photographs: list[Path]
) -> None:
    pooled = SMALL.model_copy(update={"pool": pool}).build()
    photo = photographs[0].read_bytes()
    (feature,) = pooled.extract([pooled.prepare(photo)])
    assert feature.values.shape[1] == pooled.card().dim == dim
    (both,) = extractor.extract([extractor.prepare(photo)])
    place = {"box": slice(0, 1024), "mask": slice(1024, None), "both": slice(None)}[pool]
    np.testing.assert_array_equal(feature.values, both.values[:, place])


def test_extractor_comes_back_from_its_card(extractor: Extractor) -> None:
    card = ExtractorCard.parse(extractor.card().plain(), "card")
    assert card.segments
    assert from_card(card).card() == card
