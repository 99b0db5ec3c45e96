import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from pipeline.data.media.decoding import Picture
from pipeline.data.media.image_check import BadImageError
from pipeline.data.media.image_pixels import reduction, upright_srgb


def gradient(width: int = 56, height: int = 40) -> Image.Image:
    across = np.broadcast_to(np.linspace(20, 230, width), (height, width))
    down = np.broadcast_to(np.linspace(10, 200, height)[:, None], (height, width))
    pixels = np.stack([across, down, np.full_like(across, 90)], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_and_pixels_are_turned_as_the_exif_tag_says(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Picture(encoded(gradient(), kind, exif=exif))
    untagged = Image.open(io.BytesIO(encoded(gradient(), kind)))
    untagged.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(untagged).convert("RGB"))
    assert (picture.height, picture.width) == expected.shape[:2]
    np.testing.assert_array_equal(picture.pixels(), expected)


def test_photographs_are_decoded_as_pillow_decodes_them(photographs: list[Path]) -> None:
    for path in photographs:
        expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        np.testing.assert_array_equal(Picture(path.read_bytes()).pixels(), expected, path.name)


@pytest.mark.parametrize("by", [2, 4, 8])
def test_a_jpeg_is_reduced_while_it_is_decoded(by: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    picture = Picture(encoded(gradient(203, 121), "JPEG", quality=95, exif=exif))
    reduced = picture.pixels(by).copy()
    assert reduced.shape == (-(-121 // by), -(-203 // by), 3)
    whole = Image.fromarray(picture.pixels())
    expected = np.asarray(whole.resize(reduced.shape[1::-1], Image.Resampling.BOX), int)
    assert np.abs(expected - reduced).mean() < 3


def test_other_formats_are_decoded_whole_whatever_the_reduction() -> None:
    picture = Picture(encoded(gradient(), "PNG"))
    np.testing.assert_array_equal(picture.pixels(4), np.asarray(gradient()))


def test_threads_decode_into_memory_of_their_own() -> None:
    payloads = [encoded(gradient(40 + n, 30), "JPEG") for n in range(40)]
    expected = [Picture(payload).pixels().copy() for payload in payloads]

    def copied(payload: bytes) -> np.ndarray:
        return Picture(payload).pixels().copy()

    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, pixels in zip(pool.map(copied, payloads), expected, strict=True):
                np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("JPEG", mode) for mode in ("L", "CMYK", "RGB")),
        *(("PNG", mode) for mode in ("L", "P", "RGBA", "1")),
        ("TIFF", "CMYK"),
    ],
)
def test_every_kind_of_pixels_is_shown_by_the_one_rule(kind: str, mode: str) -> None:
    payload = encoded(gradient().convert(mode), kind)
    np.testing.assert_array_equal(Picture(payload).pixels(), upright_srgb(payload))


def test_a_jpeg_with_a_colour_profile_is_shown_by_the_one_rule() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    payload = encoded(gradient(), "JPEG", icc_profile=profile)
    assert Picture(payload).pixels(2).shape == (40, 56, 3)
    np.testing.assert_array_equal(Picture(payload).pixels(), upright_srgb(payload))


def test_what_is_no_image_or_was_cut_short_is_refused() -> None:
    with pytest.raises(BadImageError, match="not-an-image"):
        Picture(b"text")
    for kind in ("JPEG", "PNG"):
        payload = encoded(gradient(), kind)
        with pytest.raises(BadImageError, match="truncated-image"):
            Picture(payload[: len(payload) * 2 // 3]).pixels()


def test_a_reduction_leaves_at_least_the_pixels_that_are_needed() -> None:
    assert [reduction(640, 480, size) for size in (500, 480, 241, 240, 224, 120, 60, 7)] == [
        *(1, 1, 1, 2, 2, 4, 8, 8)
    ]
    assert reduction(480, 640, 224) == 2
