"""The pixels that a person sees of an image file: upright, sRGB, eight bits a channel.

- **Orientation** is applied: what Exif says, else what XMP says (`tiff:Orientation`), as Pillow's
  `exif_transpose` has it. Browsers go by Exif alone; photo editors write both alike, or XMP alone.
  Of an AVIF the container says it, which overrules both.
- **Colour profiles**: pixels are taken from the embedded ICC profile to sRGB, by relative
  colorimetry with black-point compensation, whether RGB, grey or CMYK. A profile that is damaged,
  or of another kind than the pixels, counts as absent; then RGB is taken as sRGB and CMYK is
  converted by the plain formula.
- **Alpha**, of any form, is put over white, **palettes** are looked up, **grey** becomes three
  equal channels.
- **16 bits** a channel are scaled to 8, or become 8 by another rule of the caller. What cannot be
  made of 8 bits `image_file` refuses.
- Of several frames or pages the first is taken.
"""

import functools
import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from pipeline.data.media import jpeg
from pipeline.data.media.image_file import BadImageError, is_deep_grey, opened

Pixels = npt.NDArray[np.uint8]  # (height, width), or with channels (height, width, channels)
ToEightBits = Callable[[npt.NDArray[Any]], Pixels]  # of grey values, which have 16

# These rules, as the cards of extractors say them. A change of what is made of an image changes
# its features, so it must change this text: the identity of every extractor is taken from it.
DECODING = {
    "step": "decode",
    "orientation": "as Exif says, else XMP",
    "damaged JPEG": "refused",
    "colour profile": "to sRGB",
    "transparency": "over white",
    "16-bit": "scaled",
    "CMYK": "by its colour profile, or the plain formula",
    "animation": "first frame",
}

_ANIMATED_FORMATS = ("GIF", "PNG", "WEBP", "AVIF")  # a TIFF has pages, an MPO other views
_ORIENTATION_TAG = 0x0112
_XMP_ORIENTATION = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])\s*["'<]""")
_COLOUR_SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}  # of profiles, by Pillow's modes
# The decoder has fast code for these; 5/8 of a picture takes longer than all of it.
_REDUCTIONS = (8, 4, 2)


def scaled(values: npt.NDArray[Any]) -> Pixels:
    """Maps 0 to 65535 evenly to 0 to 255."""
    return (values.astype(np.float32) / 257).round().astype(np.uint8)


def upright_srgb(
    payload: bytes, shorter_side: int | None = None, to_eight_bits: ToEightBits = scaled
) -> Pixels:
    """Returns RGB pixels (height, width, 3), scaled down to `shorter_side` if there are more.

    The picture is never enlarged. Raises BadImageError as `check_image` does.
    """
    with opened(payload) as file:
        pixels = as_stored(payload, file, shorter_side, to_eight_bits)
        pixels = _shrunk(pixels, shorter_side)
        pixels = _in_srgb(pixels, file.info.get("icc_profile"))
        return np.ascontiguousarray(_turned(pixels, _orientation(file)))


def as_stored(
    payload: bytes,
    file: Image.Image,
    shorter_side: int | None = None,
    to_eight_bits: ToEightBits = scaled,
) -> Pixels:
    """Returns the pixels of an opened image before colours and turning; raises BadImageError.

    They are grey (height, width), RGB or CMYK (height, width, channels), at the least as large as
    `shorter_side` asks for.
    """
    pixels = _fast_jpeg(payload, file, shorter_side)
    return np.array(eight_bits(file, to_eight_bits)) if pixels is None else pixels


def is_plain(payload: bytes) -> bool:
    """Whether a JPEG's pixels are shown as they are stored: upright, and in no space of its own.

    The same rule as `upright_srgb`'s; of a header without metadata it takes microseconds to say.
    """
    if not jpeg.has_metadata(payload):
        return True
    try:
        with opened(payload) as file:
            return _orientation(file) == 1 and "icc_profile" not in file.info
    except BadImageError:  # `upright_srgb` says so, and why
        return False


def is_animated(payload: bytes) -> bool:
    """Whether an image has more than one frame to be shown in turn; raises BadImageError."""
    with opened(payload) as file:
        return file.format in _ANIMATED_FORMATS and getattr(file, "is_animated", False)


def reduction(width: int, height: int, size: int) -> int:
    """Returns by how much a part of this size can be reduced and still be `size` pixels a side."""
    return next((by for by in _REDUCTIONS if min(width, height) >= by * size), 1)


def eight_bits(file: Image.Image, to_eight_bits: ToEightBits = scaled) -> Image.Image:
    """Loads an image and returns it in mode RGB, L or CMYK: eight bits a channel, opaque."""
    file.load()
    if is_deep_grey(file):
        return Image.fromarray(to_eight_bits(np.asarray(file)))
    if file.has_transparency_data:
        image = file.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if file.mode == "1":
        return file.convert("L")
    return file if file.mode in _COLOUR_SPACES else file.convert("RGB")


def _fast_jpeg(payload: bytes, file: Image.Image, shorter_side: int | None) -> Pixels | None:
    """Decodes an ordinary JPEG, at a fraction of its size if that is enough; else None."""
    if file.format not in ("JPEG", "MPO"):
        return None
    if file.mode not in ("RGB", "L"):
        header = jpeg.read_header(payload)
        if header is not None:
            jpeg.require_whole(payload, header)  # Pillow, which has the pixels, would not say
        return None
    by = reduction(*file.size, shorter_side or max(file.size))
    width, height = (-(-side // by) for side in file.size)
    colours = "GRAY" if file.mode == "L" else "RGB"
    pixels = jpeg.decode(payload, colours, min_height=height, min_width=width)
    return pixels[..., 0] if pixels is not None and file.mode == "L" else pixels


def _shrunk(pixels: Pixels, shorter_side: int | None) -> Pixels:
    """Scales down by Pillow's antialiased bicubic filter, in torch, which has it six times as fast.

    Both round alike: no value differs by more than one.
    """
    sides = pixels.shape[:2]
    if shorter_side is None or min(sides) <= shorter_side:
        return pixels
    import torch
    from torch.nn import functional

    scale = shorter_side / min(sides)
    size = [max(shorter_side, round(side * scale)) for side in sides]
    batch = torch.from_numpy(np.atleast_3d(pixels)).unsqueeze(0).permute(0, 3, 1, 2)  # (1, C, H, W)
    small = functional.interpolate(batch, size, mode="bicubic", antialias=True)
    shrunk: Pixels = small.permute(0, 2, 3, 1).numpy()[0]
    return shrunk if pixels.ndim == 3 else shrunk[..., 0]


def _in_srgb(pixels: Pixels, profile: bytes | None) -> Pixels:
    mode = "L" if pixels.ndim == 2 else "RGB" if pixels.shape[2] == 3 else "CMYK"
    transform = _srgb_transform(profile, mode) if profile else None
    if transform is not None:
        converted = ImageCms.applyTransform(_image(pixels, mode), transform)
        assert converted is not None  # as it is not done in place
        return np.asarray(converted)
    return pixels if mode == "RGB" else np.asarray(_image(pixels, mode).convert("RGB"))


def _image(pixels: Pixels, mode: str) -> Image.Image:
    height, width = pixels.shape[:2]
    return Image.frombytes(mode, (width, height), pixels.tobytes())


@functools.lru_cache(maxsize=64)  # a camera's photographs all carry the same profile
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Returns the way from a profile to sRGB, or None if it is no way, or none is needed."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space != _COLOUR_SPACES[mode]:
            return None
        if mode == "RGB" and "sRGB" in ImageCms.getProfileDescription(opened):
            return None
        return ImageCms.buildTransform(
            opened,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (OSError, ImageCms.PyCMSError):
        return None


def _orientation(file: Image.Image) -> int:
    """Returns Exif's number of how the picture lies, 1 to 8; 1 is upright.

    A TIFF is turned as its tag says when it is loaded, and whatever else it says is of no account.
    """
    if file.format == "TIFF":
        return 1
    try:
        if file.format == "AVIF":
            exif = Image.Exif()
            exif.load(file.info.get("exif", b""))  # Pillow puts there what the container says
            number = int(exif.get(_ORIENTATION_TAG, 1))
        else:
            number = int(file.getexif().get(_ORIENTATION_TAG, 0)) or _orientation_by_xmp(file)
    except Exception:  # damaged metadata fails in many ways; viewers show such pictures as they lie
        return 1
    return number if number in range(1, 9) else 1


def _orientation_by_xmp(file: Image.Image) -> int:
    xmp = file.info.get("xmp") or file.info.get("XML:com.adobe.xmp") or b""
    found = _XMP_ORIENTATION.search(xmp.encode() if isinstance(xmp, str) else xmp)
    return int(found[1]) if found else 0


def _turned(pixels: Pixels, orientation: int) -> Pixels:
    """Undoes how the camera was held; the numbers are EXIF's."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
