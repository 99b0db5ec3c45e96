"""Inline images: small JPEGs of pictures, which a page carries inside itself."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from pipeline.data.media.image_file import opened
from pipeline.data.media.image_pixels import Pixels
from pipeline.vision.preprocess.image import decode
from pipeline.vision.preprocess.video import FramesConfig, has_frames, read_frames
from pipeline.vision.preprocess.window import AnyWindow

BOX_RATIOS = (1.0, 4 / 3)  # narrowest and widest box


@dataclass(frozen=True)
class InlineImage:
    """What a page needs to show an image: the bytes as a URL, and its size in pixels."""

    url: str
    width: int
    height: int

    def fit(self, ratio: float) -> float:
        """Returns its width in percent of a box of the given width / height that holds it whole."""
        return min(100.0, 100 * self.width / self.height / ratio)


def thumbnail(image: bytes, max_side: int = 320) -> bytes:
    """Returns the image as a JPEG whose longer side is at most `max_side` pixels.

    It is decoded by the extractors' rules, so boxes fit it; small images are not enlarged. Of a
    video it is the frame in the middle. Raises FeatureError if the bytes are neither.
    """
    return shrink(still(image), max_side)


def still(image: bytes, window: AnyWindow = "stored") -> Pixels:
    """Returns what is shown of an image, or of a video; a DICOM by its own window by default."""
    if has_frames(image):
        ((_, pixels),) = read_frames(image, FramesConfig(count=1, folder_rate=1), window)
        return pixels
    return decode(image, window)


def shrink(pixels: Pixels, max_side: int = 320) -> bytes:
    """Returns pixels as a JPEG whose longer side is at most `max_side`."""
    shown = Image.fromarray(pixels)
    shown.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def inline_image(jpeg: bytes) -> InlineImage:
    """Returns the JPEG with a URL that holds the bytes themselves."""
    with opened(jpeg) as file:
        width, height = file.size
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")
    return InlineImage(url, width, height)


def shared_ratio(pictures: Sequence[InlineImage]) -> float:
    """Returns the width / height of the box in which a gallery shows all its pictures alike."""
    if not pictures:
        return 1.0
    median = sorted(shown.width / shown.height for shown in pictures)[len(pictures) // 2]
    return min(max(median, BOX_RATIOS[0]), BOX_RATIOS[1])
