from typing import Any

import numpy as np
import pytest

from pipeline.data.media.augmentation import AugmentConfig
from pipeline.data.read.images import live_features
from pipeline.vision.extractors.detection.regions import RegionsConfig
from pipeline.vision.extractors.grid import GridConfig
from pipeline.vision.extractors.imported import ImportedConfig
from pipeline.vision.extractors.live import backbone_config, live_card, live_config, refusal
from pipeline.vision.extractors.patches import PatchesConfig
from pipeline.vision.extractors.pixels import PixelsConfig
from pipeline.vision.extractors.registry import AnyExtractor
from tests.vision.photo_dataset import picture

PIXELS = PixelsConfig(image_size=32, patch_size=8)
GRID = GridConfig(network="resnet18", node="layer4", weights="random", image_size=64)


@pytest.mark.parametrize(
    ("extractor", "reason"),
    [
        (PIXELS, None),
        (GRID, None),
        (GRID.model_copy(update={"fit": "crop"}), "use fit=stretch"),
        (GRID.model_copy(update={"storage": "int8"}), "storage is of features that are stored"),
        (RegionsConfig(), "has no gradient"),
        (PatchesConfig(network="any"), "towers of transformers"),
        (ImportedConfig(identity="0" * 32, dim=8), "no network to run"),
    ],
)
def test_extractors_that_cannot_be_live_are_refused_with_the_reason(
    extractor: AnyExtractor, reason: str | None
) -> None:
    found = refusal(extractor)
    assert (found is None) == (reason is None)
    assert (reason or "") in (found or "")


@pytest.mark.parametrize("extractor", [PIXELS, GRID])
def test_a_live_card_says_how_pictures_are_varied_and_is_no_stored_one(extractor: Any) -> None:
    augment = AugmentConfig(area=(0.5, 1.0))
    plain, varied, stored = (
        live_card(extractor, None),
        live_card(extractor, augment),
        extractor.build().card(),
    )
    assert len({card.identity for card in (plain, varied, stored)}) == 3
    assert (plain.dim, plain.grid) == (stored.dim, stored.grid)
    config = live_config(varied)
    assert config is not None
    assert config.images.augment == augment
    assert config.whole() == live_config(plain)
    assert live_config(stored) is None


def test_live_pixels_are_the_stored_patches() -> None:
    config = live_config(live_card(PIXELS, None))
    assert config is not None
    extractor = PIXELS.build()
    (stored,) = extractor.extract([extractor.prepare(picture(1))])
    found = live_features(picture(1), config)
    assert found.values.shape[1:] == stored.values.shape
    assert np.abs(found.values[0].astype(int) - stored.values).max() <= 1


def test_only_a_network_becomes_a_backbone() -> None:
    assert backbone_config(live_card(GRID, None)) == GRID
    assert backbone_config(live_card(PIXELS, None)) is None
    assert backbone_config(GRID.build().card()) is None
    assert backbone_config(None) is None
