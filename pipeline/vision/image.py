"""Image bytes to the pixels a network sees: decoding, then named steps that go on the card.

Pixels are uint8 RGB arrays (height, width, 3). Every step is deterministic and treats one image
at a time, so that nothing of another image can reach a feature.
"""

import io
import struct
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from pipeline.data.kind import is_dicom, is_video
from pipeline.errors import FeatureError
from pipeline.vision.window import (
    AnyWindow,
    Window,
    apply_window,
    decode_dicom,
    describe_window,
)

Pixels = npt.NDArray[np.uint8]
View = tuple[float, float, float, float]  # x1, y1, x2, y2 as fractions of width and height

# What `decode` does, as the card says it. A change of these rules changes features, so it must
# change this text: the identity of every extractor is taken from it.
DECODING = {
    "step": "decode",
    "orientation": "as the EXIF tag says",
    "transparency": "over white",
    "16-bit": "high byte",
    "CMYK": "without its colour profile",
    "animation": "first frame",
}
_ORIENTATION_TAG = 0x0112
_WHITE = (255, 255, 255, 255)


def decode(payload: bytes, window: AnyWindow = None) -> Pixels:
    """Returns the picture as a viewer would show it, or raises FeatureError saying why not.

    The rules are those of `DECODING`; a window is for DICOM and for 16-bit pictures. Floating-point
    and 32-bit integer images are refused: they do not say which value is white.
    """
    if is_dicom(payload):
        images, _ = decode_dicom(payload, window)
        if len(images) > 1:
            raise FeatureError(
                f"a DICOM of {len(images)} images; set extractor.frames, as for a video"
            )
        return images[0]
    if is_video(payload):
        raise FeatureError("a video; set extractor.frames to {count: 8}, or to {rate: 1} a second")
    try:
        with Image.open(io.BytesIO(payload)) as image:
            pixels = _rgb(image, payload, window)
            return np.ascontiguousarray(_turn(pixels, _orientation(image)))
    except FeatureError:
        raise
    except Exception as error:  # Pillow's readers let a dozen kinds through on damaged files
        raise FeatureError(
            f"not a readable image ({type(error).__name__}: {error}); {len(payload)} bytes "
            f"beginning {payload[:8]!r}"
        ) from error


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
class ResizeShortSideBicubic:
    """Scales the shorter side to `size`, as `ResizeShortSide`, by the cubic filter."""

    name: ClassVar[str] = "resize the short side, antialiased bicubic"
    size: int

    def __call__(self, pixels: Pixels, view: View) -> tuple[Pixels, View]:
        width, height = _short_side(pixels, self.size)
        return _resize(pixels, width, height, Image.Resampling.BICUBIC), view


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


Step = Resize | ResizeShortSide | ResizeWithin | ResizeBicubic | ResizeShortSideBicubic | CentreCrop


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


def _rgb(image: Image.Image, payload: bytes, window: AnyWindow) -> Pixels:
    if image.format == "JPEG" and image.mode in ("RGB", "L"):
        jpeg = _fast_jpeg(image, payload)
        if jpeg is not None:
            return jpeg
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        values = np.asarray(image)
        if isinstance(window, Window):
            grey = apply_window(values, window)
        else:
            grey = (values.astype(np.uint32) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise FeatureError(
            f"a {image.format} image with 32 bits per pixel (mode {image.mode}) has no stated "
            "range; convert it to 8 or 16 bits"
        )
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", picture.size, _WHITE), picture)
    return np.asarray(image.convert("RGB"))


def _fast_jpeg(image: Image.Image, payload: bytes) -> Pixels | None:
    """Decodes about a third faster than Pillow, to the same values: both use libjpeg-turbo.

    Returns None where Pillow should judge: damaged files, and sizes that it guards against.
    """
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or 0):
        return None
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            payload, colorspace="RGB", fastdct=False, fastupsample=False
        )
    except ValueError:
        return None
    return pixels


def _orientation(image: Image.Image) -> int:
    """Returns the turn still to be made: Pillow makes that of a TIFF while loading its pixels."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except (SyntaxError, ValueError, TypeError, struct.error):
        return 1  # EXIF that cannot be read turns nothing, as in any viewer


def _turn(pixels: Pixels, orientation: int) -> Pixels:
    """Undoes the camera's rotation or mirroring. Numbers are those of the EXIF standard."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


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
    picture = Image.fromarray(pixels)
    return np.asarray(picture.resize((width, height), resampling))
