"""Tells whether bytes are a whole image before they go into a shard."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Literal

import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipeline.data.kind import is_picture

Verify = Literal["decode", "header"]

_JPEG_BEGINS = b"\xff\xd8\xff"


class BadImageError(Exception):
    """Bytes that are no usable image. `reason` is a reject's: a short slug."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def check_image(payload: bytes, verify: Verify) -> tuple[int, int]:
    """Returns the width and height in pixels as stored, before any turning by EXIF.

    `decode` decodes every pixel, which is what finds files that were cut short; `header` reads
    only the size and costs a hundredth. Raises BadImageError with reason `not-an-image`,
    `truncated-image`, `oversized-image` or `undecodable-image`.
    """
    return _fast_jpeg_size(payload, verify) or _size(payload, verify)


@contextlib.contextmanager
def faults_as_reasons(payload: bytes) -> Iterator[None]:
    """Turns what Pillow raises about an image into a BadImageError, and keeps its warnings back."""
    if not payload:
        raise BadImageError("not-an-image", "the file is empty")
    try:
        # Pillow warns of odd metadata and of large pictures; neither makes a picture unusable.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        detail = f"no image format begins with {payload[:8]!r}; {len(payload)} bytes"
        if not is_picture(payload):
            detail = "a video or a DICOM image, of which an extractor makes pictures"
        raise BadImageError("not-an-image", detail) from error
    except Image.DecompressionBombError as error:
        raise BadImageError("oversized-image", str(error)) from error
    except Exception as error:  # Pillow's readers let a dozen kinds through on damaged files
        cut_short = "truncated" in str(error).lower()
        reason = "truncated-image" if cut_short else "undecodable-image"
        raise BadImageError(reason, f"{error}; {len(payload)} bytes") from error


def _size(payload: bytes, verify: Verify) -> tuple[int, int]:
    with faults_as_reasons(payload), Image.open(io.BytesIO(payload)) as image:
        if verify == "decode":
            image.load()
        return image.size


def _fast_jpeg_size(payload: bytes, verify: Verify) -> tuple[int, int] | None:
    """Returns the size if the fast decoder is content; it is stricter than Pillow.

    Pillow, which has the last word, takes twenty times as long to read a header.
    """
    if not payload.startswith(_JPEG_BEGINS):
        return None
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(payload)
        if Image.MAX_IMAGE_PIXELS is not None and height * width > Image.MAX_IMAGE_PIXELS:
            return None
        if verify == "decode":
            simplejpeg.decode_jpeg(payload, colorspace="GRAY")
    except ValueError:
        return None
    return width, height
