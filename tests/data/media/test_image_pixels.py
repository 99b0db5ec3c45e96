import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo

from pipeline.data.media.decoding import Picture
from pipeline.data.media.image_check import BadImageError, check_image
from pipeline.data.media.image_pixels import is_animated, upright_srgb
from pipeline.data.media.reencode import ReencodeConfig, reencode
from pipeline.vision.preprocess.image import decode
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


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def inserted(payload: bytes, *segments: bytes, behind: int = 2) -> bytes:
    return payload[:behind] + b"".join(segments) + payload[behind:]


XMP = b"http://ns.adobe.com/xap/1.0/\0"
XMP_FORMS = {
    "attribute": b'<rdf:Description tiff:Orientation="%d"/>',
    "single quotes": b"<rdf:Description tiff:Orientation = '%d' />",
    "element": b"<tiff:Orientation>%d</tiff:Orientation>",
    "element on lines": b"<tiff:Orientation>\n  %d\n</tiff:Orientation>",
}


def xmp_of(form: str, orientation: int) -> bytes:
    return b"<x:xmpmeta>" + XMP_FORMS[form] % orientation + b"</x:xmpmeta>"


def seen_everywhere(payload: bytes) -> np.ndarray:
    """Returns the picture as each way of reading sees it: one array, or the test fails."""
    pixels = upright_srgb(payload)
    found = Picture(payload)
    assert (found.height, found.width) == pixels.shape[:2]
    assert np.array_equal(found.pixels(), pixels)
    assert np.array_equal(decode(payload), pixels)
    stored = reencode(payload, ReencodeConfig(quality=100))
    assert (stored.height, stored.width) == pixels.shape[:2]
    assert np.abs(upright_srgb(stored.payload).astype(int) - pixels).mean() < 6
    return pixels


@pytest.mark.parametrize("xmp_form", XMP_FORMS)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_xmp_turns_a_picture_of_which_exif_says_nothing(
    form: str, xmp_form: str, orientation: int
) -> None:
    xmp, exif = xmp_of(xmp_form, orientation), Image.Exif()
    exif[0x0112] = orientation
    if form == "PNG":
        text = PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp.decode())
        payload = encoded(picture(1, WIDTH, HEIGHT), form, pnginfo=text)
    elif form == "WEBP":
        payload = encoded(picture(1, WIDTH, HEIGHT), form, xmp=xmp)
    else:
        payload = inserted(encoded(picture(1, WIDTH, HEIGHT), form), segment(0xE1, XMP + xmp))
    wanted = upright_srgb(encoded(picture(1, WIDTH, HEIGHT), form, exif=exif))
    assert np.array_equal(seen_everywhere(payload), wanted)


@pytest.mark.parametrize("exif_orientation", [1, 8])
def test_exif_wins_over_xmp_in_either_order(exif_orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = exif_orientation
    payload = encoded(picture(1, WIDTH, HEIGHT), "JPEG", exif=exif)
    xmp = segment(0xE1, XMP + xmp_of("attribute", 3))
    behind = payload.index(b"\xff\xdb")
    for both in (inserted(payload, xmp), inserted(payload, xmp, behind=behind)):
        assert np.array_equal(seen_everywhere(both), upright_srgb(payload))


def test_a_tiff_is_turned_once_whatever_says_so() -> None:
    file = io.BytesIO()
    tags = {0x0112: 6, 700: xmp_of("attribute", 6)}
    picture(1, WIDTH, HEIGHT).save(file, "TIFF", tiffinfo=tags)
    assert upright_srgb(file.getvalue()).shape == (WIDTH, HEIGHT, 3)
    assert check_image(file.getvalue(), "decode") == check_image(file.getvalue(), "header")


def test_of_an_avif_the_container_says_how_it_lies() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lying, upright = (
        encoded(picture(1, WIDTH, HEIGHT), "AVIF", quality=100, **options)
        for options in ({"exif": exif}, {})
    )
    assert seen_everywhere(lying).shape == (WIDTH, HEIGHT, 3)
    ignored = encoded(picture(1, WIDTH, HEIGHT), "AVIF", quality=100, xmp=xmp_of("element", 6))
    assert np.array_equal(seen_everywhere(ignored), upright_srgb(upright))


@pytest.mark.parametrize("number", [0, 9, 255])
def test_a_number_that_is_no_orientation_turns_nothing(number: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = number
    payload = encoded(picture(1, WIDTH, HEIGHT), "JPEG", exif=exif)
    assert seen_everywhere(payload).shape == (HEIGHT, WIDTH, 3)


def photoshop_thumbnail() -> bytes:
    """An APP13 with a JPEG inside it, whose scan is not the picture's."""
    thumbnail = encoded(picture(2, 16, 8), "JPEG")
    described = struct.pack(">IIIIIIHH", 1, 16, 8, 48, 48 * 8, len(thumbnail), 24, 1)
    size = struct.pack(">HHI", 0x040C, 0, len(described + thumbnail))
    return segment(0xED, b"Photoshop 3.0\0" + b"8BIM" + size + described + thumbnail)


def pieces_of(profile: bytes, count: int) -> list[bytes]:
    size = -(-len(profile) // count)
    return [
        segment(0xE2, b"ICC_PROFILE\0" + bytes([i + 1, count]) + profile[i * size : (i + 1) * size])
        for i in range(count)
    ]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_a_profile_is_found_in_pieces_out_of_order_and_behind_anything(order: list[int]) -> None:
    red = encoded(of_one_colour("RGB", (250, 10, 10)), "JPEG", quality=100, subsampling=0)
    pieces = pieces_of(swapped_profile(), 3)
    payload = inserted(red, photoshop_thumbnail(), *(pieces[i] for i in order))
    assert np.allclose(colour_of(seen_everywhere(payload)), (10, 250, 10), atol=6)


def test_exif_is_found_behind_a_photoshop_thumbnail() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    payload = encoded(picture(1, WIDTH, HEIGHT), "JPEG")
    described = segment(0xE1, b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0"))
    payload = inserted(payload, photoshop_thumbnail(), described)
    assert seen_everywhere(payload).shape == (WIDTH, HEIGHT, 3)


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


def test_photographs_are_decoded_as_pillow_does_it(photographs: list[Path]) -> None:
    for path in photographs[:12]:
        full = np.asarray(Image.open(path).convert("RGB"))
        assert np.abs(upright_srgb(path.read_bytes()).astype(int) - full).max() <= 1


def test_an_image_cut_short_is_found() -> None:
    for form in ("JPEG", "PNG"):
        with pytest.raises(BadImageError) as error:
            upright_srgb(encoded(Image.effect_noise((64, 48), 80), form)[:-200])
        assert error.value.reason == "truncated-image"
