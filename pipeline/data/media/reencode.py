"""Re-encoding: the smaller JPEG that is stored in an image file's place, if asked for."""

from typing import Literal, NamedTuple

import simplejpeg
from pydantic import Field, PositiveInt

from pipeline.config import Config
from pipeline.data.media.image_check import BadImageError
from pipeline.data.media.image_pixels import is_animated, upright_srgb
from pipeline.reason import Reason

SUFFIX = "jpg"


class ReencodeConfig(Config):
    """How images are encoded anew: every one becomes a JPEG in sRGB, upright, without metadata.

    `image_pixels` says how colours, alpha and depth are converted. Videos, folders of frames and
    DICOM images are stored as they came.
    """

    shorter_side: PositiveInt | None = Field(
        default=None,
        description="pixels; larger images are scaled down to it, smaller ones keep their size; "
        "null: all do",
    )
    quality: int = Field(default=90, ge=1, le=100, description="of the JPEG, 4:2:0")
    animated: Literal["first-frame", "reject"] = Field(
        default="first-frame",
        description="what becomes of GIF, PNG and WebP files with several pictures",
    )


class StoredImage(NamedTuple):
    """What goes into a shard as a sample's image. Sizes in pixels."""

    payload: bytes
    width: int
    height: int


def reencode(payload: bytes, config: ReencodeConfig) -> StoredImage:
    """Returns the image encoded anew: the same file and settings give the same bytes.

    Raises BadImageError as `check_image` does, or with reason `unsupported-pixels` or
    `animated-image`.
    """
    if config.animated == "reject" and is_animated(payload):
        raise BadImageError(Reason.ANIMATED_IMAGE, "has several frames, and animated is `reject`")
    pixels = upright_srgb(payload, config.shorter_side)
    encoded = simplejpeg.encode_jpeg(pixels, config.quality, "RGB", "420")
    height, width, _ = pixels.shape
    return StoredImage(encoded, width, height)
