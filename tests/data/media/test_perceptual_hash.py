from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.media.perceptual_hash import perceptual_hash
from tests.data.album import encoded, picture


def apart(one: int, other: int) -> int:
    return int(np.bitwise_count(np.uint64(one % 2**64) ^ np.uint64(other % 2**64)))


def test_a_picture_keeps_its_hash_in_other_formats_and_sizes() -> None:
    image = picture(1, 200, 150)
    kept = perceptual_hash(encoded(image))
    assert -(2**63) <= kept < 2**63
    assert apart(kept, perceptual_hash(encoded(image, "JPEG", quality=60))) <= 4
    assert apart(kept, perceptual_hash(encoded(image.resize((100, 75)), "WEBP"))) <= 4


def test_a_picture_keeps_its_hash_however_the_camera_was_held() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = picture(1).transpose(Image.Transpose.ROTATE_90)
    payload = encoded(turned, "PNG", exif=exif)
    assert perceptual_hash(payload) == perceptual_hash(encoded(picture(1)))


def test_photographs_are_far_apart(photographs: list[Path]) -> None:
    hashes = [perceptual_hash(path.read_bytes()) for path in photographs[:28]]
    assert min(apart(*pair) for pair in combinations(hashes, 2)) > 10
