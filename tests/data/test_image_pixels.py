import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from pipeline.data.image_check import BadImageError
from pipeline.data.image_pixels import is_animated, upright_srgb
from tests.data.album import encoded, picture

WIDTH, HEIGHT = 37, 23


def of_one_colour(mode: str, colour: int | tuple[int, ...]) -> Image.Image:
    return Image.new(mode, (WIDTH, HEIGHT), colour)


def colour_of(pixels: np.ndarray) -> tuple[int, ...]:
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == pixels[0, 0]).all()
    return tuple(pixels[0, 0].tolist())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_camera_may_be_held_in_any_way(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    payload = encoded(picture(1, WIDTH, HEIGHT), form, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(payload))).convert("RGB")
    assert np.array_equal(upright_srgb(payload), np.asarray(upright))


def test_damaged_metadata_turns_nothing() -> None:
    payload = encoded(picture(1), "JPEG", exif=b"Exif\0\0MM\0*" + struct.pack(">I", 10**6))
    assert upright_srgb(payload).shape == (32, 48, 3)


def test_grey_becomes_three_equal_channels() -> None:
    for form in ("JPEG", "PNG"):
        assert colour_of(upright_srgb(encoded(of_one_colour("L", 77), form))) == (77, 77, 77)
    assert colour_of(upright_srgb(encoded(of_one_colour("1", 1)))) == (255, 255, 255)


def test_sixteen_bits_are_scaled_to_eight() -> None:
    values = np.full((HEIGHT, WIDTH), 100 * 257 + 120, np.uint16)
    for form in ("PNG", "TIFF"):
        payload = encoded(Image.fromarray(values), form)
        assert colour_of(upright_srgb(payload)) == (100, 100, 100)
    brightest = encoded(Image.fromarray(np.full((HEIGHT, WIDTH), 65535, np.uint16)))
    assert colour_of(upright_srgb(brightest)) == (255, 255, 255)


def test_palettes_are_looked_up() -> None:
    image = of_one_colour("RGB", (200, 30, 40)).quantize(4)
    assert image.mode == "P"
    assert colour_of(upright_srgb(encoded(image))) == (200, 30, 40)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_is_white(mode: str) -> None:
    if mode in ("RGBA", "LA"):
        payload = encoded(of_one_colour(mode, (9,) * (len(mode) - 1) + (0,)))
    else:
        payload = encoded(of_one_colour(mode, 0), transparency=0 if mode == "P" else (0, 0, 0))
    assert colour_of(upright_srgb(payload)) == (255, 255, 255)


def test_half_transparent_black_is_grey() -> None:
    assert colour_of(upright_srgb(encoded(of_one_colour("RGBA", (0, 0, 0, 128))))) == (127,) * 3


def test_cmyk_without_a_profile_is_converted_by_the_plain_formula() -> None:
    payload = encoded(of_one_colour("CMYK", (0, 0, 0, 255)), "JPEG", quality=100)
    assert colour_of(upright_srgb(payload)) == (0, 0, 0)
    payload = encoded(of_one_colour("CMYK", (0, 0, 0, 0)), "TIFF")
    assert colour_of(upright_srgb(payload)) == (255, 255, 255)


def swapped_profile() -> bytes:
    """A profile of RGB in which red and green have changed places: any eye sees if it is used."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    at = {profile[i : i + 4].decode(): i for i in range(132, 132 + 12 * profile[131], 12)}
    red, green = (slice(at[tag] + 4, at[tag] + 12) for tag in ("rXYZ", "gXYZ"))
    profile[red], profile[green] = profile[green], profile[red]
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF"])
def test_an_embedded_profile_says_what_the_numbers_mean(form: str) -> None:
    red = of_one_colour("RGB", (250, 10, 10))
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    payload = encoded(red, form, icc_profile=swapped_profile(), **options)
    seen = colour_of(upright_srgb(payload))
    assert np.allclose(seen, (10, 250, 10), atol=6)


def test_a_profile_of_another_kind_than_the_pixels_counts_as_absent() -> None:
    grey = of_one_colour("L", 77)
    payload = encoded(grey, "PNG", icc_profile=swapped_profile())
    assert colour_of(upright_srgb(payload)) == (77, 77, 77)
    assert colour_of(upright_srgb(encoded(grey, icc_profile=b"no profile"))) == (77, 77, 77)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_an_agreed_white_are_refused(mode: str) -> None:
    with pytest.raises(BadImageError) as error:
        upright_srgb(encoded(of_one_colour(mode, 1), "TIFF"))
    assert error.value.reason == "unsupported-pixels"


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_larger_images_are_scaled_down_as_pillow_does_it(form: str) -> None:
    image = picture(2, 300, 200)
    payload = encoded(image, form)
    pixels = upright_srgb(payload, 120)
    assert pixels.shape == (120, 180, 3)
    full = Image.open(io.BytesIO(payload))
    expected = np.asarray(full.resize((180, 120), Image.Resampling.BICUBIC))
    assert np.abs(pixels.astype(int) - expected).max() <= 1


def test_a_jpeg_that_is_decoded_at_half_its_size_looks_the_same() -> None:
    image = picture(2, 400, 300)
    pixels = upright_srgb(encoded(image, "JPEG", quality=95), 100)
    expected = np.asarray(image.resize((133, 100), Image.Resampling.BICUBIC))
    assert pixels.shape == (100, 133, 3)
    assert np.abs(pixels.astype(int) - expected).mean() < 1.5


def test_smaller_images_are_never_enlarged() -> None:
    assert upright_srgb(encoded(picture(3), "JPEG"), 100).shape == (32, 48, 3)


def test_frames_are_told_from_pages() -> None:
    frames = {"save_all": True, "append_images": [picture(2), picture(3)]}
    first = picture(1)
    assert is_animated(encoded(first, "GIF", **frames))
    assert is_animated(encoded(first, "PNG", **frames))
    assert is_animated(encoded(first, "WEBP", **frames))
    assert not is_animated(encoded(first, "TIFF", **frames))
    assert not is_animated(encoded(first, "GIF"))
    pixels = upright_srgb(encoded(first, "PNG", **frames))
    assert np.array_equal(pixels, np.asarray(first))


def test_photographs_are_decoded_as_pillow_does_it(shared_data: Path) -> None:
    for path in sorted((shared_data / "coco" / "val2017").glob("*.jpg"))[:5]:
        full = np.asarray(Image.open(path).convert("RGB"))
        assert np.abs(upright_srgb(path.read_bytes()).astype(int) - full).max() <= 1


def test_an_image_cut_short_is_found() -> None:
    for form in ("JPEG", "PNG"):
        with pytest.raises(BadImageError) as error:
            upright_srgb(encoded(Image.effect_noise((64, 48), 80), form)[:-200])
        assert error.value.reason == "truncated-image"
