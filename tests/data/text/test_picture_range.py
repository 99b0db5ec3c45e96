"""What a split's pictures have in common, and which picture is unlike all of them."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.read.features import FeatureBatch
from pipeline.data.text.picture_range import PictureRange


class Pictures:
    """A split of pictures whose features are given, as far as it is asked for."""

    def __init__(self, features: list[FeatureBatch], files: list[bytes]) -> None:
        self.num_samples = len(files)
        self._features, self._files = features, files

    def image(self, row: int) -> bytes:
        return self._files[row]

    def features(self, rows: list[int]) -> FeatureBatch:
        (row,) = rows
        return self._features[row]


def features(level: float = 0.0, regions: int = 4, deviation: float = 1.0) -> FeatureBatch:
    rng = np.random.default_rng(3)
    values = (level + deviation * rng.standard_normal((1, regions, 6))).astype(np.float32)
    return FeatureBatch(
        values, np.zeros((1, regions, 4), np.float32), np.array([regions], np.int32)
    )


def picture(width: int = 40, height: int = 30, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


def seen(mode: str = "RGB") -> PictureRange:
    split: Any = Pictures(
        [features(0.1 * number, 4 + number % 3) for number in range(100)],
        [picture(40 + number, 30, mode) for number in range(100)],
    )
    return PictureRange.of(split)


def test_a_picture_of_the_split_is_like_it() -> None:
    pictures = seen()
    assert pictures.num_pictures == 64
    for number in (0, 50, 99):
        like = features(0.1 * number, 4 + number % 3), picture(40 + number)
        assert pictures.unlike(*like) == []


@pytest.mark.parametrize(
    ("given", "file", "said"),
    [
        (features(40.0), picture(), ["its features' mean, in training"]),
        (features(1.0, regions=90), picture(), ["90 regions, in training 4 to 6"]),
        (features(1.0, deviation=9), picture(), ["deviation, in training", "region to region"]),
        (features(1.0), picture(4000, 30), ["4000 pixels of width, in training 40 to 139"]),
        (features(1.0), picture(40, 3), ["3 pixels of height, in training 30 to 30"]),
    ],
)
def test_what_is_unlike_is_told_with_the_range(
    given: FeatureBatch, file: bytes, said: list[str]
) -> None:
    told = seen().unlike(given, file)
    assert all(any(part in one for one in told) for part in said)


def test_colour_is_unlike_where_all_were_grey_and_not_the_other_way_round() -> None:
    assert seen("L").unlike(features(), picture()) == ["in colour, in training all grey"]
    assert seen().unlike(features(), picture(mode="L")) == []


def test_it_comes_back_from_json_and_other_media_have_no_size() -> None:
    pictures = seen()
    assert PictureRange.from_json(pictures.to_json()) == pictures
    assert pictures.unlike(features(), b"a video") == []
