"""An image file, opened by Pillow within bounds, and the reasons against it.

Every image is opened here, so that what is inside may be anything:

- **Formats** are those of `FORMATS`, told by the content, whatever the file is called. Pillow reads
  others, some of them by starting other programs (Ghostscript for EPS).
- **Sizes** beyond Pillow's bound for decompression bombs are an `oversized-image`.
- **Text in a PNG**, however long, is not unpacked but for what may say how the picture lies, and a
  colour profile only up to `MAX_METADATA_BYTES`. Beyond that it counts as absent.
- **Pixels** that no decoder of ours can make eight bits of are `unsupported-pixels`: 32 bits a
  channel and floating point, which have no agreed white, and colour spaces that no viewer shows.
"""

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from pipeline.data.media.kind import is_picture
from pipeline.reason import Reason

# Pillow's names; MPO is opened as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")
MAX_METADATA_BYTES = 16 << 20  # unpacked, of each piece

_PNG_BEGINS = b"\x89PNG\r\n\x1a\n"
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
# Text by these names may be XMP or Exif; all other is only for people.
_METADATA = (b"XML:com.adobe.xmp", b"Raw profile type exif")
_MAX_EXPANSION = 1032  # of deflate: bytes that come of one


class BadImageError(Exception):
    """Bytes that are no usable image. `reason` is a reject's."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@contextlib.contextmanager
def opened(payload: bytes) -> Iterator[Image.Image]:
    """Opens an image whose pixels can be shown; what fails in the block is a BadImageError too."""
    with _faults_as_reasons(payload):
        # Globals of Pillow, which every use sets alike. Its own bound for all text of a file is
        # lower than a single profile may be.
        PngImagePlugin.MAX_TEXT_CHUNK = MAX_METADATA_BYTES
        PngImagePlugin.MAX_TEXT_MEMORY = 4 * MAX_METADATA_BYTES
        with Image.open(io.BytesIO(_without_long_text(payload)), formats=FORMATS) as file:
            _require_supported(file)
            yield file


def max_pixels() -> int:
    """Returns how many pixels an image may have: Pillow's bound, from which on it refuses."""
    return 2 * (Image.MAX_IMAGE_PIXELS or 0)


def is_deep_grey(file: Image.Image) -> bool:
    """Whether pixels are one channel of 16 bits."""
    return file.mode.startswith("I;16") or (file.mode == "I" and file.format == "PPM")


@contextlib.contextmanager
def _faults_as_reasons(payload: bytes) -> Iterator[None]:
    """Turns what Pillow raises about an image into a BadImageError, and keeps its warnings back."""
    if not payload:
        raise BadImageError(Reason.NOT_AN_IMAGE, "the file is empty")
    try:
        # Pillow warns of odd metadata and of large pictures; neither makes a picture unusable.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        detail = (
            f"begins with {payload[:8]!r}, as no file of {', '.join(FORMATS)} does that can be "
            f"read; {len(payload)} bytes"
        )
        if not is_picture(payload):
            detail = "a video or a DICOM image, of which an extractor makes pictures"
        raise BadImageError(Reason.NOT_AN_IMAGE, detail) from error
    except Image.DecompressionBombError as error:
        raise BadImageError(Reason.OVERSIZED_IMAGE, str(error)) from error
    except Exception as error:  # Pillow's readers let a dozen kinds through on damaged files
        cut_short = "truncated" in str(error).lower()
        reason = Reason.TRUNCATED_IMAGE if cut_short else Reason.UNDECODABLE_IMAGE
        raise BadImageError(reason, f"{error}; {len(payload)} bytes") from error


def _require_supported(file: Image.Image) -> None:
    if is_deep_grey(file):
        return
    if file.mode in ("I", "F"):
        raise BadImageError(Reason.UNSUPPORTED_PIXELS, f"mode {file.mode}: 32 bits a channel")
    try:
        Image.new(file.mode, (1, 1)).convert("RGB")
    except ValueError as error:
        raise BadImageError(Reason.UNSUPPORTED_PIXELS, f"mode {file.mode}: {error}") from error


def _without_long_text(payload: bytes) -> bytes:
    """Returns a PNG without the chunks that are only for people, or unpack beyond the bound."""
    if not payload.startswith(_PNG_BEGINS):
        return payload
    kept, at, start = [], len(_PNG_BEGINS), 0
    while at + 12 <= len(payload):
        length, kind = struct.unpack_from(">I4s", payload, at)
        end = at + 12 + length
        if end > len(payload):  # cut short, which the decoder says
            break
        if kind in (*_TEXT_CHUNKS, b"iCCP") and _is_left_out(kind, payload[at + 8 : end - 4]):
            kept.append(payload[start:at])
            start = end
        at = end
    return b"".join([*kept, payload[start:]]) if kept else payload


def _is_left_out(kind: bytes, chunk: bytes) -> bool:
    keyword, _, rest = chunk.partition(b"\0")
    if kind in _TEXT_CHUNKS and keyword not in _METADATA:
        return True
    packed = rest[1:]
    if kind == b"iTXt":
        is_packed, (_, _, packed) = rest[:1] == b"\1", _three_fields(rest[2:])
        if not is_packed:
            return len(packed) > MAX_METADATA_BYTES
    if kind == b"tEXt" or len(packed) * _MAX_EXPANSION <= MAX_METADATA_BYTES:
        return len(chunk) > MAX_METADATA_BYTES
    unpacker = zlib.decompressobj()
    try:
        return len(unpacker.decompress(packed, MAX_METADATA_BYTES + 1)) > MAX_METADATA_BYTES
    except zlib.error:  # the reader says so
        return False


def _three_fields(rest: bytes) -> tuple[bytes, bytes, bytes]:
    """Cuts what follows an iTXt's flags: language, translated keyword, text."""
    language, _, rest = rest.partition(b"\0")
    translated, _, text = rest.partition(b"\0")
    return language, translated, text
