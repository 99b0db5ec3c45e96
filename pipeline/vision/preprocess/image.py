"""Image preprocessing: the pixels a network sees, by named steps that go on the card.

Pixels are uint8 RGB arrays (height, width, 3). Every step is deterministic and treats one image
at a time, so that nothing of another image can reach a feature.
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.data.media.decoding import Picture
from pipeline.data.media.image_file import BadImageError, max_pixels
from pipeline.data.media.image_pixels import DECODING, Pixels, scaled
from pipeline.data.media.kind import is_dicom, is_video
from pipeline.errors import FeatureError, UnusableImageError
from pipeline.reason import Reason
from pipeline.vision.preprocess.window import (
    AnyWindow,
    Window,
    apply_window,
    decode_dicom,
    describe_window,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of red, green, blue in [0, 1], as all torchvision weights
IMAGENET_STD = (0.229, 0.224, 0.225)

View = tuple[float, float, float, float]  # x1, y1, x2, y2 as fractions of width and height


def decode(payload: bytes, window: AnyWindow = None) -> Pixels:
    """Returns the picture as a viewer would show it, or raises FeatureError saying why not.

    ConfigError is for a library that is not installed.

    The rules are those of `data.image_pixels`; a window is for DICOM and for 16-bit pictures.
    """
    if is_dicom(payload):
        ((_, pixels),) = decode_dicom(payload, window)
        return pixels
    if is_video(payload):
        raise FeatureError("a video; set extractor.frames to {count: 8}, or to {rate: 1} a second")
    to_eight_bits = partial(apply_window, window=window) if isinstance(window, Window) else scaled
    try:
        return Picture(payload, to_eight_bits).pixels().copy()  # from memory that is used again
    except BadImageError as error:
        raise UnusableImageError(error.reason, error.detail) from error


@dataclass(frozen=True)
class Resize:
    """Scales to exactly size × size, whatever the picture's proportions were."""

    name: ClassVar[str] = "resize, antialiased bilinear"
    size: int

    def __call__(self, pixels: Pixels, view: View) -> tuple[Pixels, View]:
        return _resize(pixels, self.size, self.size), view


@dataclass(frozen=True)
class ResizeShortSide:
    """Scales the shorter side to `size` and keeps the proportions (torchvision's `Resize(int)`)."""

    name: ClassVar[str] = "resize the short side, antialiased bilinear"
    size: int

    def __call__(self, pixels: Pixels, view: View) -> tuple[Pixels, View]:
        return _resize(pixels, *_short_side(pixels, self.size)), view


@dataclass(frozen=True)
class ResizeWithin:
    """Scales the shorter side to `short_side`, or less if the longer would pass `long_side`."""

    name: ClassVar[str] = "resize to a short and at most a long side, antialiased bilinear"
    short_side: int
    long_side: int

    def __call__(self, pixels: Pixels, view: View) -> tuple[Pixels, View]:
        height, width = pixels.shape[:2]
        scale = min(self.short_side / min(height, width), self.long_side / max(height, width))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        return _resize(pixels, *size), view


@dataclass(frozen=True)
class ResizeBicubic:
    """Scales to exactly size × size, as `Resize`, by the cubic filter."""

    name: ClassVar[str] = "resize, antialiased bicubic"
    size: int

    def __call__(self, pixels: Pixels, view: View) -> tuple[Pixels, View]:
        return _resize(pixels, self.size, self.size, Image.Resampling.BICUBIC), view


@dataclass(frozen=True)
class CentreCrop:
    """Keeps the middle size × size pixels (torchvision's `CenterCrop`)."""

    name: ClassVar[str] = "centre crop"
    size: int

    def __call__(self, pixels: Pixels, view: View) -> tuple[Pixels, View]:
        height, width = pixels.shape[:2]
        if height < self.size or width < self.size:
            raise ValueError(f"cannot crop {self.size} pixels from {width} × {height}")
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        x1, y1, x2, y2 = view
        scale_x, scale_y = (x2 - x1) / width, (y2 - y1) / height
        kept = (
            x1 + left * scale_x,
            y1 + top * scale_y,
            x1 + (left + self.size) * scale_x,
            y1 + (top + self.size) * scale_y,
        )
        return pixels[top : top + self.size, left : left + self.size], kept


@dataclass(frozen=True)
class ResizeTo:
    """Scales to exactly width × height by one of Pillow's filters, all of them antialiased."""

    name: ClassVar[str] = "resize"
    width: int
    height: int
    filter: str  # Pillow's name

    def __call__(self, pixels: Pixels, view: View) -> tuple[Pixels, View]:
        resampling = Image.Resampling[self.filter]
        return _resize(pixels, self.width, self.height, resampling), view


@dataclass(frozen=True)
class ResizeShortSideTo:
    """Scales the shorter side to `size` and keeps the proportions, by one of Pillow's filters."""

    name: ClassVar[str] = "resize the short side"
    size: int
    filter: str  # Pillow's name

    def __call__(self, pixels: Pixels, view: View) -> tuple[Pixels, View]:
        width, height = _short_side(pixels, self.size)
        return _resize(pixels, width, height, Image.Resampling[self.filter]), view


@dataclass(frozen=True)
class PaddedCentreCrop:
    """Keeps the middle size × size pixels, amid black where there are fewer (transformers').

    Of an odd number of pixels to leave out, one more goes on the right and below, where
    torchvision's `CenterCrop` rounds half to even.
    """

    name: ClassVar[str] = "centre crop, rounded down, padded"
    size: int

    def __call__(self, pixels: Pixels, view: View) -> tuple[Pixels, View]:
        height, width = pixels.shape[:2]
        top, left = (height - self.size) // 2, (width - self.size) // 2
        kept = np.zeros((self.size, self.size, 3), np.uint8)
        inner = pixels[max(top, 0) : top + self.size, max(left, 0) : left + self.size]
        y, x = max(-top, 0), max(-left, 0)
        kept[y : y + inner.shape[0], x : x + inner.shape[1]] = inner
        x1, y1, x2, y2 = view
        scale_x, scale_y = (x2 - x1) / width, (y2 - y1) / height
        return kept, (
            x1 + left * scale_x,
            y1 + top * scale_y,
            x1 + (left + self.size) * scale_x,
            y1 + (top + self.size) * scale_y,
        )


Step = (
    Resize
    | ResizeShortSide
    | ResizeWithin
    | ResizeBicubic
    | CentreCrop
    | ResizeTo
    | ResizeShortSideTo
    | PaddedCentreCrop
)


@dataclass(frozen=True)
class Prepared:
    """One image as its network takes it, and which part of the picture that is."""

    pixels: Pixels  # (height, width, 3)
    view: View


def prepare(payload: bytes, steps: tuple[Step, ...], window: AnyWindow = None) -> Prepared:
    """Decodes an image and takes it through the steps; FeatureError if it cannot be decoded."""
    return preprocess(decode(payload, window), steps)


def preprocess(pixels: Pixels, steps: tuple[Step, ...]) -> Prepared:
    """Takes a picture through the steps."""
    view: View = (0.0, 0.0, 1.0, 1.0)
    for step in steps:
        pixels, view = step(pixels, view)
    return Prepared(np.ascontiguousarray(pixels), view)


def cell_boxes(grid: tuple[int, int], view: View) -> npt.NDArray[np.float32]:
    """Returns the boxes of the cells (H * W, 4) as fractions of the whole picture, row by row."""
    height, width = grid
    x1, y1, x2, y2 = view
    across, down = np.linspace(x1, x2, width + 1), np.linspace(y1, y2, height + 1)
    left, top = np.meshgrid(across[:-1], down[:-1])
    right, bottom = np.meshgrid(across[1:], down[1:])
    return np.stack([left, top, right, bottom], axis=-1).reshape(-1, 4).astype(np.float32)


def describe(steps: tuple[Step, ...], window: AnyWindow = None) -> list[dict[str, Any]]:
    """Returns the decoding rules and every step with its settings, as the card lists them."""
    described = ({"step": step.name, **asdict(step)} for step in steps)
    return [DECODING, *describe_window(window), *described]


def _short_side(pixels: Pixels, size: int) -> tuple[int, int]:
    """Returns width and height of the picture whose shorter side is `size`."""
    height, width = pixels.shape[:2]
    if height < width:
        return int(size * width / height), size
    return size, int(size * height / width)


def _resize(
    pixels: Pixels,
    width: int,
    height: int,
    resampling: Image.Resampling = Image.Resampling.BILINEAR,
) -> Pixels:
    if pixels.shape[:2] == (height, width):
        return pixels
    if width * height > max_pixels():
        found = f"{pixels.shape[1]} × {pixels.shape[0]} pixels"
        raise UnusableImageError(Reason.OVERSIZED_IMAGE, f"{found} would become {width} × {height}")
    picture = Image.fromarray(pixels)
    return np.asarray(picture.resize((width, height), resampling))
