"""Image bytes to the pixels a person sees, no more of them than are needed.

What those are is `image_pixels`' to say. A plain JPEG, as most photographs are, can be decoded to
a half, a quarter or an eighth of its size at a fraction of the cost.
"""

import io
import threading

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from pipeline.data.image_pixels import ORIENTATION_TAG, Pixels, ToEightBits, scaled, upright_srgb

# What says in a JPEG's header, which ends where its scan begins, that pixels may not be shown as
# they are stored.
_ORIENTED, _PROFILED, _SCAN = b"Exif\0\0", b"ICC_PROFILE\0", b"\xff\xda"


class Picture:
    """An image's size as it is shown, and its pixels when they are asked for.

    Raises BadImageError if the bytes are no image that can be shown.
    """

    def __init__(self, payload: bytes, to_eight_bits: ToEightBits = scaled) -> None:
        self._payload = payload
        self._whole: Pixels | None = None
        size = _size_of_plain_jpeg(payload)
        if size is None:
            self._whole = upright_srgb(payload, to_eight_bits=to_eight_bits)
            size = self._whole.shape[:2]
        self.height, self.width = size

    def pixels(self, reduction: int = 1) -> Pixels:
        """Returns the picture (height, width, 3), a plain JPEG at 1 / `reduction` of its size.

        The array may share the calling thread's scratch memory: it holds until the next call in
        the same thread. Raises BadImageError if the file is damaged.
        """
        if self._whole is None:
            try:
                pixels: Pixels = simplejpeg.decode_jpeg(
                    self._payload,
                    colorspace="RGB",
                    min_height=-(-self.height // reduction),
                    min_width=-(-self.width // reduction),
                    buffer=_scratch(3 * self.height * self.width),
                )
                return pixels
            except ValueError:  # of damaged files some can be read in other ways
                self._whole = upright_srgb(self._payload)
        return self._whole


def _size_of_plain_jpeg(payload: bytes) -> tuple[int, int] | None:
    """Returns height and width of a JPEG whose pixels are shown as they are stored, else None."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(payload)
    except ValueError:
        return None
    if colours not in ("YCbCr", "GRAY") or height * width > (Image.MAX_IMAGE_PIXELS or 0):
        return None
    header = payload[: payload.find(_SCAN)]
    if _PROFILED in header or (_ORIENTED in header and not _is_plain(payload)):
        return None
    return height, width


def _is_plain(payload: bytes) -> bool:
    """Whether a JPEG with EXIF, whose thumbnail may hide the rest of the header, is upright."""
    try:
        with Image.open(io.BytesIO(payload)) as image:
            orientation = image.getexif().get(ORIENTATION_TAG, 1)
            return bool(orientation == 1 and "icc_profile" not in image.info)
    except Exception:  # damaged metadata fails in many ways; `upright_srgb` has the last word
        return False


_thread = threading.local()


def _scratch(size_bytes: int) -> npt.NDArray[np.uint8]:
    """Returns memory of the calling thread: touching fresh pages is a quarter of decoding."""
    scratch: npt.NDArray[np.uint8] | None = getattr(_thread, "scratch", None)
    if scratch is None or len(scratch) < size_bytes:
        scratch = _thread.scratch = np.empty(size_bytes, np.uint8)
    return scratch
