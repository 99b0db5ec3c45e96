import io

import numpy as np
import pytest
from PIL import Image

from pipeline.config import check
from pipeline.errors import ConfigError
from pipeline.vision.extractors.pixels import PixelsConfig
from pipeline.vision.extractors.registry import from_card


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_patches_are_cut_row_by_row() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    extractor = PixelsConfig(image_size=6, patch_size=2).build()
    (feature,) = extractor.extract([extractor.prepare(png(pixels))])
    assert feature.values.shape == (9, 12)
    assert feature.values.dtype == np.uint8
    np.testing.assert_array_equal(feature.values[5].reshape(2, 2, 3), pixels[2:4, 4:6])


def test_picture_of_any_proportions_fills_the_grid() -> None:
    extractor = PixelsConfig(image_size=12, patch_size=4).build()
    wide = np.random.default_rng(0).integers(0, 256, (10, 50, 3), np.uint8)
    (feature,) = extractor.extract([extractor.prepare(png(wide))])
    card = extractor.card()
    assert feature.values.shape == (card.num_regions, card.dim) == (9, 48)
    assert card.grid == (3, 3)
    assert feature.boxes is None


def test_identity_changes_with_each_setting_and_not_with_the_device() -> None:
    base = PixelsConfig(image_size=12, patch_size=4)
    assert base.build("cpu").name == base.build("cuda").name
    names = {
        config.build().name
        for config in (
            base,
            PixelsConfig(image_size=16, patch_size=4),
            PixelsConfig(image_size=12, patch_size=2),
        )
    }
    assert len(names) == 3


def test_extractor_comes_back_from_its_card() -> None:
    extractor = PixelsConfig(image_size=12, patch_size=4).build()
    assert from_card(extractor.card()).card() == extractor.card()


def test_half_a_patch_is_refused() -> None:
    with pytest.raises(ConfigError, match="image_size=10 is not a multiple of patch_size=4"):
        check(PixelsConfig, {"type": "pixels", "image_size": 10, "patch_size": 4}, "recipe")
