import io
import re
import struct
from collections.abc import Callable
from functools import partial
from random import Random

import numpy as np
import pytest
from PIL import Image

from pipeline.data.media import jpeg
from pipeline.data.media.decoding import Picture
from pipeline.data.media.image_check import BadImageError, check_image
from pipeline.data.media.image_pixels import upright_srgb
from pipeline.data.media.perceptual_hash import perceptual_hash
from pipeline.data.media.reencode import ReencodeConfig, reencode
from tests.data.album import encoded, picture

WIDTH, HEIGHT = 96, 64


def photograph(**options: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    return encoded(Image.fromarray(noise), "JPEG", **options)


def scan_start(payload: bytes) -> int:
    at = payload.index(b"\xff\xda")
    (length,) = struct.unpack(">H", payload[at + 2 : at + 4])
    return at + 2 + int(length)


def damaged(payload: bytes) -> bytes:
    """Loses a part of the coded pixels, but not the end marker."""
    start = scan_start(payload)
    return payload[: start + (len(payload) - start) // 2] + b"\xff\xd9"


def damaged_anyhow(payload: bytes, random: Random) -> bytes:
    """Damages a file behind its first tables: bits, bytes, scans, restart markers, or its end."""
    first = payload.index(b"\xff\xdb")
    at = random.randrange(first, len(payload))
    length = random.choice((1, 2, 16, 128))
    rest = payload[at + length :]
    markers = [m.start() for m in re.finditer(rb"\xff[\xda\xd0-\xd7]", payload)]
    marker = random.choice(markers)
    match random.choice(("flip", "cut", "end", "noise", "zeros", "insert", "drop", "scan")):
        case "flip":
            return (
                payload[:at] + bytes([payload[at] ^ 1 << random.randrange(8)]) + payload[at + 1 :]
            )
        case "cut":
            return payload[:at]
        case "end":
            return payload[:at] + b"\xff\xd9"
        case "noise":
            return payload[:at] + random.randbytes(length) + rest
        case "zeros":
            return payload[:at] + bytes(length) + rest
        case "insert":
            return payload[:at] + random.randbytes(length) + payload[at:]
        case "drop":
            return payload[:at] + rest
        case _:
            after = next((start for start in markers if start > marker), len(payload) - 2)
            return payload[:marker] + payload[after:]


def every_pixel(payload: bytes, colours: str) -> bool:
    return jpeg.decode(payload, colours) is not None


def verdict(can_read: Callable[[], bool]) -> bool | tuple[str, str]:
    """Returns whether a decoder can read a file, or what it has against it."""
    try:
        return can_read()
    except BadImageError as error:
        return error.reason, error.detail


def reasons(payload: bytes) -> set[str]:
    """What each way of reading an image has against it."""
    found = set()
    for read in (
        lambda: check_image(payload, "decode"),
        lambda: upright_srgb(payload),
        lambda: upright_srgb(payload, 16),
        lambda: Picture(payload).pixels(),
        lambda: Picture(payload).pixels(2),
        lambda: reencode(payload, ReencodeConfig()),
        lambda: perceptual_hash(payload),
    ):
        try:
            read()
            found.add("none")
        except BadImageError as error:
            found.add(error.reason)
    return found


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": b"Exif\0\0II*\0"}])
def test_damage_that_pillow_fills_in_is_refused_wherever_the_image_is_read(
    options: dict[str, object],
) -> None:
    payload = damaged(photograph(**options))
    Image.open(io.BytesIO(payload)).load()  # which says nothing
    assert reasons(payload) == {"corrupt-image"}


def test_surplus_bytes_in_the_coded_pixels_are_damage_wherever_the_image_is_read() -> None:
    payload = photograph()
    assert reasons(payload[:-2] + b"\x12" * 40 + payload[-2:]) == {"corrupt-image"}
    assert reasons(payload[:-2] + b"\0" + payload[-2:]) == {"none"}  # as some cameras pad


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": b"Exif\0\0II*\0"}])
def test_padding_is_no_damage_wherever_the_image_is_read(options: dict[str, object]) -> None:
    payload = photograph(**options)
    tables = payload.index(b"\xff\xdb")
    for padded in (
        payload[:-2] + b"\0" * 300 + payload[-2:],
        payload[:-2] + b"\0" * 300 + payload[-2:] + b"<!-- from a web server -->",
        payload[:tables] + b"\0\x01\xff\0" + payload[tables:],
        payload[:tables] + b"\0" * 9 + payload[tables:-2] + b"\0" * 9 + payload[-2:],
    ):
        assert reasons(padded) == {"none"}
        assert np.array_equal(upright_srgb(padded), upright_srgb(payload))


@pytest.mark.parametrize("progressive", [False, True])
def test_coded_pixels_that_end_with_zeros_may_be_padded(progressive: bool) -> None:
    for grey in range(0, 256, 5):
        image = Image.new("RGB", (WIDTH, HEIGHT), (grey, 7 * grey % 256, 90))
        payload = encoded(image, "JPEG", progressive=progressive)
        padded = payload[:-2] + b"\0" * 99 + payload[-2:]
        assert check_image(padded, "decode") == (WIDTH, HEIGHT), grey
        assert np.array_equal(upright_srgb(padded), upright_srgb(payload)), grey


def test_zeros_in_place_of_pixels_are_damage() -> None:
    payload = photograph()
    for lost in (40, 400, 2000):
        assert reasons(payload[: -2 - lost] + b"\0" * lost + payload[-2:]) == {"corrupt-image"}


def test_damage_in_four_colours_is_found_as_well() -> None:
    inked = encoded(picture(1, WIDTH, HEIGHT).convert("CMYK"), "JPEG")
    assert reasons(inked) == {"none"}
    assert reasons(damaged(inked)) == {"corrupt-image"}


def test_every_way_of_reading_has_the_same_against_a_flipped_bit() -> None:
    payload = photograph(quality=60)
    rng = np.random.default_rng(3)
    seen = set()
    for place in rng.integers(2, len(payload), 60).tolist():
        flipped = bytearray(payload)
        flipped[place] ^= 1 << int(rng.integers(8))
        found = reasons(bytes(flipped))
        assert len(found) == 1, (place, found)
        seen |= found
    assert seen >= {"none", "corrupt-image"}


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("restarts", [{}, {"restart_marker_blocks": 5}])
def test_the_smallest_size_shows_the_damage_that_every_pixel_would(
    progressive: bool, mode: str, restarts: dict[str, int]
) -> None:
    image = picture(1, WIDTH, HEIGHT).convert(mode)
    payload = encoded(image, "JPEG", quality=70, progressive=progressive, **restarts)
    random, seen = Random(5), set()
    for _ in range(150):
        broken = damaged_anyhow(payload, random)
        header = jpeg.read_header(broken)
        if header is None or header.height * header.width > 100 * WIDTH * HEIGHT:
            continue
        colours = "CMYK" if mode == "CMYK" else "GRAY"
        found = verdict(partial(jpeg.require_whole, broken, header))
        assert found == verdict(partial(every_pixel, broken, colours))
        seen.add(found if isinstance(found, bool) else found[0])
    assert seen >= {True, "corrupt-image", "truncated-image"}


def test_a_file_without_an_end_marker_is_whole_if_all_pixels_are_there() -> None:
    payload = photograph()
    assert reasons(payload[:-2]) == {"none"}
    assert np.array_equal(upright_srgb(payload[:-2]), upright_srgb(payload))


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_file_that_ends_among_its_pixels_is_not(options: dict[str, object]) -> None:
    payload = photograph(**options)
    for size_bytes in (len(payload) // 2, len(payload) - 40):
        assert reasons(payload[:size_bytes]) == {"truncated-image"}


def test_a_progressive_file_that_ends_between_its_scans_is_not_whole() -> None:
    payload = photograph(progressive=True)
    last = [match.start() for match in re.finditer(b"\xff\xda", payload)][-1]
    assert reasons(payload[:last]) == {"truncated-image"}


def test_text_behind_the_end_of_a_picture_is_nobody_s_business() -> None:
    assert reasons(photograph() + b"<!-- from a web server -->" * 9) == {"none"}


def test_a_header_is_read_up_to_its_scan_and_no_further() -> None:
    payload = photograph()
    assert jpeg.read_header(payload) == (HEIGHT, WIDTH, "YCbCr")
    assert not jpeg.has_metadata(payload)
    comment = b"\xff\xfe" + struct.pack(">H", 2 + 17) + b"ICC_PROFILE\0Exif\0"
    assert not jpeg.has_metadata(payload[:2] + comment + payload[2:])
    assert jpeg.has_metadata(photograph(exif=b"Exif\0\0II*\0"))
    assert jpeg.has_metadata(photograph(icc_profile=b"x" * 200_000))
    assert jpeg.has_metadata(payload[:2] + b"??" + payload[2:])
    assert jpeg.read_header(b"GIF89a") is None
