"""Tells whether bytes are a whole image before they go into a shard."""

import io
import warnings
from typing import Literal

import simplejpeg
from PIL import Image, UnidentifiedImageError

Verify = Literal["decode", "header"]


class BadImageError(Exception):
    """Bytes that are no usable image. `reason` is a reject's: a short slug."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def check_image(payload: bytes, verify: Verify) -> tuple[int, int]:
    """Returns the width and height in pixels as stored, before any turning by EXIF.

    `decode` decodes every pixel, which is what finds files that were cut short; `header` reads
    only the size and costs a twentieth. Raises BadImageError with reason `not-an-image`,
    `truncated-image`, `oversized-image` or `undecodable-image`.
    """
    if not payload:
        raise BadImageError("not-an-image", "the file is empty")
    try:
        # Pillow warns of odd metadata and of large pictures; neither makes a picture unusable.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(payload)) as image:
                if verify == "decode" and not _decodes_as_jpeg(payload, image.format):
                    image.load()
                return image.size
    except UnidentifiedImageError as error:
        detail = f"no image format begins with {payload[:8]!r}; {len(payload)} bytes"
        raise BadImageError("not-an-image", detail) from error
    except Image.DecompressionBombError as error:
        raise BadImageError("oversized-image", str(error)) from error
    except Exception as error:  # Pillow's readers let a dozen kinds through on damaged files
        cut_short = "truncated" in str(error).lower()
        reason = "truncated-image" if cut_short else "undecodable-image"
        raise BadImageError(reason, f"{error}; {len(payload)} bytes") from error


def _decodes_as_jpeg(payload: bytes, form: str | None) -> bool:
    """Whether the fast decoder is content. It is stricter than Pillow, which has the last word."""
    if form != "JPEG":
        return False
    try:
        simplejpeg.decode_jpeg(payload, colorspace="GRAY")
    except ValueError:
        return False
    return True
