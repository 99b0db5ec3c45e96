"""The fast decoder of JPEG files.

It reads what most photographs are, at a tenth of the time that Pillow takes; what it cannot read
is left to Pillow. Where both can, they differ on damage: Pillow fills in what is missing and says
nothing. Here a file whose coded pixels are damaged is a `corrupt-image` wherever it is met, since
nobody can tell how much of such a picture is what was photographed. (Of the
flipped bits in photographs that can be noticed at all, Pillow lets nine in ten pass.) A file that
ends without an end marker, but after its last pixel, is whole, and so is one that is padded between
the segments of its header, or with zeros before its end marker.
"""

import contextlib
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg

from pipeline.data.media.image_file import BadImageError
from pipeline.reason import Reason

Pixels = npt.NDArray[np.uint8]

BEGINS = b"\xff\xd8\xff"
_END = b"\xff\xd9"
_CORRUPT, _ENDS_EARLY = "Corrupt JPEG data", "Premature end of JPEG file"
_LAST_ZEROS = (1, 0, 4)  # that the coded pixels of a padded file may end with, the likeliest first
_SURPLUS = "extraneous bytes before marker"  # of a corrupt file
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_PROFILE = b"ICC_PROFILE\0"
_APP1, _APP2, _SCAN = 0xE1, 0xE2, 0xDA
_ONE_PASS = (0xC0, 0xC1)  # frames whose pixels are refined by no later scan


class Header(NamedTuple):
    """Size in pixels as stored, and colours as they are coded."""

    height: int
    width: int
    colours: str  # YCbCr, GRAY, RGB, CMYK or YCCK


def read_header(payload: bytes) -> Header | None:
    """Returns what a JPEG's header says; None if the decoder cannot read it."""
    if not payload.startswith(BEGINS):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(payload)
    except ValueError:
        return None
    return Header(height, width, colours)


def decode(payload: bytes, colours: str, **sizes: Any) -> Pixels | None:
    """Returns pixels (height, width, channels), or None if another decoder has the last word.

    `sizes` are of simplejpeg: min_height, min_width, buffer. Raises BadImageError with reason
    `corrupt-image` or `truncated-image`.
    """
    try:
        return _decode(payload, colours, sizes)
    except ValueError as error:
        fault = str(error)
    if fault.startswith(_ENDS_EARLY):
        if _has_one_scan(payload):
            try:
                return _decode(payload + _END, colours, sizes)
            except ValueError:
                pass
        raise BadImageError(Reason.TRUNCATED_IMAGE, f"{fault}; {len(payload)} bytes")
    if fault.startswith(_CORRUPT):
        for num_zeros in _LAST_ZEROS if _SURPLUS in fault else ():
            with contextlib.suppress(ValueError):
                return _decode(_without_padding(payload, num_zeros), colours, sizes)
        advice = "fetch it again, or save it anew if it looks as it should"
        raise BadImageError(Reason.CORRUPT_IMAGE, f"{fault}; {len(payload)} bytes; {advice}")
    return None


def require_whole(payload: bytes, header: Header) -> bool:
    """Reads every coded pixel; returns whether this decoder can. Raises as `decode` does.

    Damage is met where codes are read, which takes three quarters of decoding and is the same
    whatever size is asked for: the smallest is.
    """
    colours = "CMYK" if header.colours in ("CMYK", "YCCK") else "GRAY"
    return decode(payload, colours, min_height=1, min_width=1) is not None


def has_metadata(payload: bytes) -> bool:
    """Whether the header has what may say that pixels are not shown as they are stored.

    That is Exif, XMP that speaks of orientation, or a piece of an ICC profile, behind whatever
    else; anything odd counts too. What it says is `image_pixels`' to read.
    """
    for marker, start, end in _segments(payload):
        if marker is None:
            return True
        if marker == _APP1:
            if payload.startswith(_EXIF, start):
                return True
            if payload.startswith(_XMP, start) and payload.find(b"Orientation", start, end) >= 0:
                return True
        if marker == _APP2 and payload.startswith(_PROFILE, start):
            return True
    return False


def _decode(payload: bytes, colours: str, sizes: dict[str, Any]) -> Pixels:
    pixels: Pixels = simplejpeg.decode_jpeg(payload, colours, **sizes)
    return pixels


def _segments(payload: bytes) -> Iterator[tuple[int | None, int, int]]:
    """Yields marker, first byte and end of each segment up to the first scan, that included.

    A None for a marker stands for what is no segment, after which nothing is looked at.
    """
    at, size_bytes = 2, len(payload)
    while at + 4 <= size_bytes and payload[at] == 0xFF:
        marker = payload[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        (length,) = struct.unpack_from(">H", payload, at + 2)
        yield marker, at + 4, at + 2 + length
        if marker == _SCAN:
            return
        at += 2 + length
    yield None, at, at


def _without_padding(payload: bytes, num_zeros: int) -> bytes:
    """Returns a file without what is between its header's segments, and all but so many last zeros.

    Pixels are coded in neither: where zeros are all that is left of some, they are missed.
    """
    kept, at = [payload[:2]], 2
    while (start := payload.find(b"\xff", at)) >= 0 and start + 4 <= len(payload):
        marker = payload[start + 1]
        if marker in (0x00, 0xFF):  # no marker, and a fill byte
            at = start + 1
            continue
        if marker == _SCAN:
            scans, end, behind = payload[start:].rpartition(_END)
            stripped = scans[: len(scans.rstrip(b"\0")) + num_zeros]
            return b"".join([*kept, stripped, end, behind]) if end else payload
        (length,) = struct.unpack_from(">H", payload, start + 2)
        at = start + 2 + length
        kept.append(payload[start:at])
    return payload


def _has_one_scan(payload: bytes) -> bool:
    """Whether the first scan has all there is to know of all pixels."""
    num_components = None
    for marker, start, _ in _segments(payload):
        if marker in _ONE_PASS and len(payload) > start + 5:
            num_components = payload[start + 5]
        if marker == _SCAN:
            return payload[start] == num_components
    return False
