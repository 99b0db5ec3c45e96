import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.media.augmentation import AugmentConfig, View, random_view
from pipeline.data.media.decoding import Picture
from pipeline.data.read.dataset import Dataset, Split
from pipeline.data.read.features import FeatureBatch
from pipeline.data.read.images import (
    ImageBatch,
    ImageConfig,
    ImageReader,
    LiveConfig,
    live_features,
    render,
)
from pipeline.data.sample import Texts
from pipeline.errors import ConfigError, ShardError
from pipeline.vision.extractors.pixels import PixelsConfig
from pipeline.vision.preprocess.image import Prepared
from tests.data.tiny_dataset import TinyDataset, make_texts

SIZE = 16


def photograph(number: int) -> Image.Image:
    """A smooth picture of its own colours, width 40 + n and height 30."""
    width, height = 40 + number, 30
    x, y = np.linspace(0, 3, width), np.linspace(0, 2, height)[:, None]
    waves = [np.sin(x + number), np.cos(y + number), np.sin(x + y - number)]
    pixels = np.stack([np.broadcast_to(wave, (height, width)) for wave in waves], axis=2)
    return Image.fromarray((127 + 120 * pixels).astype(np.uint8))


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    photograph(number).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """11 photographs in three shards."""
    written = TinyDataset(str(tmp_path_factory.mktemp("photographs")), image=jpeg)
    for numbers in (range(4), range(4, 8), range(8, 11)):
        written.add_shard("train", numbers)
    return Dataset.open(written.url).split("train")


class Pictures:
    """The images of a split by their rows."""

    def __init__(self, split: Split) -> None:
        self._rows = split._rows
        self._reader = ImageReader(split._members)

    def read(self, rows: np.ndarray, config: ImageConfig, *how: Any) -> ImageBatch:
        return self._reader.read(self._rows.located(rows).places("image"), config, *how)


@pytest.fixture(scope="module")
def pictures(split: Split) -> Pictures:
    return Pictures(split)


def number_of(split: Split, row: int) -> int:
    return int(split.keys([row])[0].removeprefix("sample-"))


def test_pixels_are_the_whole_picture_scaled(split: Split, pictures: Pictures) -> None:
    rows = np.array([7, 0, 10, 3, 0])
    batch = pictures.read(rows, ImageConfig(size=SIZE))
    assert batch.pixels.shape == (5, SIZE, SIZE, 3)
    for pixels, row in zip(batch.pixels, rows, strict=True):
        decoded = Image.open(io.BytesIO(jpeg(number_of(split, row)))).convert("RGB")
        expected = np.asarray(decoded.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
        assert np.abs(pixels.astype(int) - expected).max() <= 1


def test_a_picture_much_larger_than_asked_for_is_reduced_to_nearly_the_same_pixels() -> None:
    large = photograph(5).resize((403, 301), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    large.save(file, "JPEG", quality=95)
    output = np.empty((32, 32, 3), np.uint8)
    render(Picture(file.getvalue()), View.whole(403, 301), output)
    expected = np.asarray(large.resize((32, 32), Image.Resampling.BILINEAR), int)
    assert np.abs(output - expected).mean() < 2


def test_an_augmented_picture_is_a_random_view_of_it(split: Split, pictures: Pictures) -> None:
    rows = np.arange(11)
    silent = [Texts(0)] * 11
    config = ImageConfig(size=SIZE, augment=AugmentConfig(area=(0.3, 0.6)))
    batch = pictures.read(rows, config, silent, np.random.default_rng)
    for i, row in enumerate(rows.tolist()):
        whole = Image.open(io.BytesIO(jpeg(number_of(split, row)))).convert("RGB")
        assert config.augment is not None
        view = random_view(config.augment, *whole.size, silent[i], np.random.default_rng(i))
        part = whole.crop((view.left, view.top, view.right, view.bottom))
        if view.is_mirrored:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        expected = np.asarray(part.resize((SIZE, SIZE), Image.Resampling.BILINEAR), int)
        assert np.abs(batch.pixels[i] - expected).max() <= 1


def test_texts_decide_which_pictures_are_mirrored(pictures: Pictures) -> None:
    texts = [Texts(0, captions=("the left one",)) if i % 2 else Texts(0) for i in range(11)]
    config = ImageConfig(size=SIZE, augment=AugmentConfig(mirror=1.0))
    rows = np.arange(11)
    found = pictures.read(rows, config, texts, np.random.default_rng).pixels
    config = ImageConfig(size=SIZE, augment=AugmentConfig(mirror=0.0))
    plain = pictures.read(rows, config, texts, np.random.default_rng).pixels
    np.testing.assert_array_equal(found[1::2], plain[1::2])
    assert np.abs(found[::2].astype(int) - plain[::2, :, ::-1]).max() <= 1
    assert (found[::2] != plain[::2]).any(axis=(1, 2, 3)).all()


def test_one_random_number_generator_gives_one_picture_whatever_the_batch(
    split: Split, pictures: Pictures
) -> None:
    config = ImageConfig(size=SIZE, augment=AugmentConfig())
    rows = np.array([5, 2, 9])
    texts = [make_texts(number_of(split, row)) for row in rows]

    def read(places: list[int]) -> ImageBatch:
        return pictures.read(
            rows[places],
            config,
            [texts[place] for place in places],
            lambda i: np.random.default_rng(40 + places[i]),
        )

    whole = read([0, 1, 2])
    for i in range(3):
        np.testing.assert_array_equal(read([i]).pixels[0], whole.pixels[i])


def test_a_view_of_one_pixel_has_its_colour() -> None:
    picture = Picture(jpeg(3))
    colour = picture.pixels()[21, 17].tolist()
    output = np.empty((4, 4, 3), np.uint8)
    render(picture, View(17, 21, 18, 22, is_mirrored=True), output)
    assert np.unique(output.reshape(-1, 3), axis=0).tolist() == [colour]


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    written = TinyDataset(str(tmp_path), image=lambda n: jpeg(n)[:300] if n == 2 else jpeg(n))
    name = written.add_shard("train", [1, 2, 3])
    live = LiveConfig(images=ImageConfig(size=SIZE), grid=(1, 1), patches=False)
    split = Dataset.open(written.url).split("train", live)
    with pytest.raises(ShardError, match=rf"{name}\.tar: sample 'sample-2': truncated-image"):
        split.features(np.arange(3))


def test_memory_of_a_batch_is_used_again_only_when_it_is_forgotten(pictures: Pictures) -> None:
    config = ImageConfig(size=SIZE)
    kept = [pictures.read(np.array([row, 3]), config) for row in range(11)]
    for row, batch in enumerate(kept):
        again = pictures.read(np.array([row]), config)
        np.testing.assert_array_equal(batch.pixels[0], again.pixels[0])
    place = kept[0].pixels.ctypes.data
    del kept, batch
    found = [pictures.read(np.array([0, 1]), config) for _ in range(11)]
    assert place in [batch.pixels.ctypes.data for batch in found]


def test_patches_are_those_of_the_pixels_extractor(pictures: Pictures) -> None:
    batch = pictures.read(np.array([4, 1, 8]), ImageConfig(size=12))
    found = batch.patches(4)
    extractor = PixelsConfig(image_size=12, patch_size=4).build()
    stored = extractor.extract([Prepared(pixels, (0, 0, 1, 1)) for pixels in batch.pixels])
    np.testing.assert_array_equal(found.values, np.stack([each.values for each in stored]))
    assert found.num_regions.tolist() == [9, 9, 9]
    np.testing.assert_allclose(found.boxes[2, 5], [2 / 3, 1 / 3, 1, 2 / 3])
    with pytest.raises(ConfigError, match="12 is not a multiple of patch_size=5"):
        batch.patches(5)


def test_whole_pictures_stand_beside_regions_that_have_no_values_yet(
    pictures: Pictures,
) -> None:
    batch = pictures.read(np.arange(3), ImageConfig(size=12))
    found = batch.whole((5, 7))
    assert found.pixels is batch.pixels
    assert found.values.shape == (3, 35, 0)
    assert found.boxes.shape == (3, 35, 4)
    assert found.num_regions.tolist() == [35, 35, 35]


@pytest.mark.parametrize("patches", [False, True])
def test_a_live_split_makes_features_of_its_images(
    split: Split, pictures: Pictures, patches: bool
) -> None:
    live = LiveConfig(
        images=ImageConfig(size=12, augment=AugmentConfig()), grid=(3, 3), patches=patches
    )
    dataset = Dataset.open(split.url)
    whole, varied = (dataset.split("train", config) for config in (live.whole(), live))
    assert whole.has_features
    rows = np.array([6, 2, 9])
    pixels = pictures.read(rows, ImageConfig(size=12))
    expected = pixels.patches(4).values if patches else pixels.pixels

    def given(batch: FeatureBatch) -> np.ndarray:
        assert batch.num_regions.tolist() == [9] * len(batch.values)
        return batch.values if batch.pixels is None else batch.pixels

    np.testing.assert_array_equal(given(whole.features(rows)), expected)
    (alone,) = given(live_features(whole.image(2), live))
    np.testing.assert_array_equal(alone, expected[1])
    texts = whole.texts(rows)
    seen = given(varied.features(rows, texts, np.random.default_rng))
    again = given(varied.features(rows[1:2], texts[1:2], lambda i: np.random.default_rng(i + 1)))
    np.testing.assert_array_equal(seen[1], again[0])
    assert (seen != expected).any()


def test_a_grid_that_is_not_of_patches_is_refused(pictures: Pictures) -> None:
    live = LiveConfig(images=ImageConfig(size=12), grid=(2, 3), patches=True)
    with pytest.raises(ConfigError, match="12 pixels a side"):
        pictures.read(np.arange(1), live.images).regions(live)
