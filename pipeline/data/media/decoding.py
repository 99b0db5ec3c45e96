"""Image decoding: the pixels a person sees, no more of them than are needed.

What those are is `image_pixels`' to say. A plain JPEG, as most photographs are, can be decoded to
a half, a quarter or an eighth of its size at a fraction of the cost.
"""

import threading

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.data.media import jpeg
from pipeline.data.media.image_pixels import Pixels, ToEightBits, is_plain, scaled, upright_srgb


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
            pixels = jpeg.decode(
                self._payload,
                "RGB",
                min_height=-(-self.height // reduction),
                min_width=-(-self.width // reduction),
                buffer=_scratch(3 * self.height * self.width),
            )
            if pixels is not None:
                return pixels
            self._whole = upright_srgb(self._payload)
        return self._whole


def _size_of_plain_jpeg(payload: bytes) -> tuple[int, int] | None:
    """Returns height and width of a JPEG whose pixels are shown as they are stored, else None."""
    header = jpeg.read_header(payload)
    if header is None or header.colours not in ("YCbCr", "GRAY"):
        return None
    height, width, _ = header
    if height * width > (Image.MAX_IMAGE_PIXELS or 0) or not is_plain(payload):
        return None
    return height, width


_thread = threading.local()


def _scratch(size_bytes: int) -> npt.NDArray[np.uint8]:
    """Returns memory of the calling thread: touching fresh pages is a quarter of decoding."""
    scratch: npt.NDArray[np.uint8] | None = getattr(_thread, "scratch", None)
    if scratch is None or len(scratch) < size_bytes:
        scratch = _thread.scratch = np.empty(size_bytes, np.uint8)
    return scratch
