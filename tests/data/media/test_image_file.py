import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pipeline.data.media.image_check import check_image
from pipeline.data.media.image_file import MAX_METADATA_BYTES, BadImageError, opened
from pipeline.data.media.image_pixels import is_animated, upright_srgb
from tests.data.album import encoded, picture
from tests.data.media.test_image_pixels import swapped_profile

ROOT = Path(__file__).parents[3]


def refused(payload: bytes) -> str:
    """Returns the reason that each way of reading an image gives against it."""
    found = set()
    for read in (
        lambda: check_image(payload, "header"),
        lambda: check_image(payload, "decode"),
        lambda: upright_srgb(payload),
        lambda: is_animated(payload),
    ):
        with pytest.raises(BadImageError) as caught:
            read()
        found.add(caught.value.reason)
    (reason,) = found
    return reason


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png_of_size(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def test_pillow_opens_images_in_one_place_and_of_named_formats() -> None:
    calls = {
        str(path.relative_to(ROOT)): re.findall(r"Image\.open\((.*)", path.read_text())
        for folder in ("pipeline", "jobs")
        for path in (ROOT / folder).rglob("*.py")
    }
    calls = {path: found for path, found in calls.items() if found}
    assert set(calls) == {"pipeline/data/media/image_file.py", "pipeline/perf/extract.py"}
    assert all("formats=" in call for found in calls.values() for call in found)


@pytest.mark.parametrize(
    "payload",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(900),
        b"%PDF-1.4\n%%EOF\n",
        b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hHIH", 0, 0, 9, 9, 96, 0, 0) + bytes(99),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        encoded(picture(1), "ICO"),
        encoded(picture(1), "TGA"),
        encoded(picture(1), "PCX"),
        encoded(picture(1), "EPS"),
    ],
    ids=["EPS", "PSD", "PDF", "WMF", "SVG", "ICO", "TGA", "PCX", "EPS-of-Pillow"],
)
def test_formats_that_are_not_named_are_no_images_whatever_they_are_called(payload: bytes) -> None:
    assert refused(payload) == "not-an-image"


@pytest.mark.parametrize(
    "form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"]
)
def test_formats_that_are_named_are_opened(form: str) -> None:
    payload = encoded(picture(1, 48, 32), form)
    assert check_image(payload, "decode") == (48, 32)
    assert upright_srgb(payload).shape == (32, 48, 3)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_that_nothing_can_show_are_refused_by_the_header_already(mode: str) -> None:
    assert refused(encoded(picture(1).convert("L").convert(mode), "TIFF")) == "unsupported-pixels"


def test_decompression_bombs_are_refused_before_memory_is_taken() -> None:
    jpeg = bytearray(encoded(picture(1), "JPEG"))
    size = jpeg.index(b"\xff\xc0") + 5
    jpeg[size : size + 4] = struct.pack(">HH", 65500, 65500)
    gif = bytearray(encoded(picture(1), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    for payload in (
        png_of_size(60_000, 60_000),
        png_of_size(2**31 - 1, 2**31 - 1),
        bytes(jpeg),
        bytes(gif),
    ):
        assert refused(payload) == "oversized-image"


def test_a_large_photograph_is_not_a_bomb_but_damage_in_it_is_found() -> None:
    jpeg = bytearray(encoded(picture(1), "JPEG"))
    size = jpeg.index(b"\xff\xc0") + 5
    jpeg[size : size + 4] = struct.pack(">HH", 9600, 9600)  # more than Pillow warns of
    assert check_image(bytes(jpeg), "header") == (9600, 9600)
    with pytest.raises(BadImageError, match="corrupt-image"):
        check_image(bytes(jpeg), "decode")


@pytest.mark.parametrize("packed", [True, False])
def test_a_png_with_long_text_is_shown(packed: bool) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "{" + "node " * 400_000 + "}", zip=packed)
    text.add_itxt("history", "step " * 400_000, zip=packed)
    payload = encoded(picture(1), "PNG", pnginfo=text)
    assert check_image(payload, "decode") == picture(1).size
    assert np.array_equal(upright_srgb(payload), np.asarray(picture(1)))


def test_text_after_the_pixels_of_a_png_is_not_unpacked() -> None:
    payload = encoded(picture(1), "PNG")
    text = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(3 * MAX_METADATA_BYTES)))
    assert check_image(payload[:-12] + text * 9 + payload[-12:], "decode") == picture(1).size


def test_xmp_of_a_png_turns_it_beside_long_text() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "node " * 400_000, zip=True)
    text.add_itxt("XML:com.adobe.xmp", "<x tiff:Orientation='6'/>" + " " * 2_000_000, zip=True)
    payload = encoded(picture(1, 48, 32), "PNG", pnginfo=text)
    assert upright_srgb(payload).shape == (48, 32, 3)


def test_a_profile_of_megabytes_is_used_and_one_without_bound_counts_as_absent() -> None:
    red = Image.new("RGB", (6, 4), (250, 10, 10))
    long = bytearray(swapped_profile() + bytes(3_000_000))
    long[:4] = struct.pack(">I", len(long))
    seen = upright_srgb(encoded(red, "PNG", icc_profile=bytes(long)))
    assert np.allclose(seen[0, 0], (10, 250, 10), atol=6)
    endless = encoded(red, "PNG", icc_profile=bytes(MAX_METADATA_BYTES + 1))
    assert np.array_equal(upright_srgb(endless), np.asarray(red))


def test_a_png_whose_chunks_run_beyond_its_end_is_cut_short() -> None:
    payload = encoded(picture(1), "PNG")
    with pytest.raises(BadImageError):
        check_image(payload[: len(payload) // 2], "decode")
    with pytest.raises(BadImageError), opened(payload[:20]):
        pass
