import io

import pytest
from PIL import Image

from pipeline.data.ingest.filters import FilterConfig
from pipeline.data.ingest.image_policy import ImagePolicy
from pipeline.data.media.image_check import BadImageError
from pipeline.data.media.reencode import ReencodeConfig
from tests.data.album import encoded, picture


def test_files_are_stored_as_they_came_by_default() -> None:
    payload = encoded(picture(1))
    stored = ImagePolicy().apply(payload)
    assert stored.payload is payload
    assert (stored.width, stored.height) == (48, 32)
    assert ImagePolicy().suffix("png") == "png"


def test_sizes_are_judged_before_images_are_made_smaller() -> None:
    small = ReencodeConfig(shorter_side=16)
    policy = ImagePolicy(reencode=small, filters=FilterConfig(min_shorter_side=32))
    stored = policy.apply(encoded(picture(1, 48, 32)))
    assert Image.open(io.BytesIO(stored.payload)).size == (24, 16)
    assert policy.suffix("png") == "jpg"
    with pytest.raises(BadImageError, match="too-small"):
        policy.apply(encoded(picture(1, 48, 31)))


def test_only_what_changes_stored_images_changes_the_identity() -> None:
    assert ImagePolicy().identity() == ImagePolicy(verify="header").identity() == ""
    assert ImagePolicy(filters=FilterConfig(min_caption_words=3)).identity() == ""
    different = [
        ImagePolicy(reencode=ReencodeConfig()),
        ImagePolicy(reencode=ReencodeConfig(quality=80)),
        ImagePolicy(reencode=ReencodeConfig(shorter_side=256)),
        ImagePolicy(filters=FilterConfig(min_shorter_side=9)),
        ImagePolicy(filters=FilterConfig(max_aspect_ratio=9)),
        ImagePolicy(filters=FilterConfig(duplicates="exact")),
        ImagePolicy(filters=FilterConfig(duplicates="near")),
        ImagePolicy(filters=FilterConfig(duplicates="near", near_distance=5)),
    ]
    assert len({policy.identity() for policy in different} | {""}) == len(different) + 1
