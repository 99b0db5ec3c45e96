"""Pixel features: raw patches, which the model learns to embed end to end."""

from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from pipeline.config import Config
from pipeline.data.read.extractor_card import ExtractionEnvironment, ExtractorCard, identity
from pipeline.vision.feature import Feature
from pipeline.vision.preprocess.image import Prepared, Resize, describe, prepare


class PixelsConfig(Config):
    """Square patches of the picture, scaled to image_size × image_size beforehand."""

    type: Literal["pixels"] = Field(
        default="pixels",
        description="square patches of the picture as they are, for a model that learns from "
        "pixels",
    )
    image_size: int = Field(
        default=64, ge=1, le=4096, description="pixels a side that the picture is scaled to"
    )
    patch_size: int = Field(default=8, ge=1, description="pixels a side of a patch")

    @model_validator(mode="after")
    def _whole_patches(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}"
            )
        return self

    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    def check(self) -> None:
        """Nothing can be missing: there are no weights."""

    def build(self, device: str = "cpu") -> "PixelsExtractor":
        """Returns the extractor. It computes nothing, so the device only goes on its card."""
        return PixelsExtractor(self, device)


class PixelsExtractor:
    """Cuts a picture into uint8 patches: (patches, patch_size * patch_size * 3), row-major.

    Patches come row by row, and within a patch its pixels row by row, each red, green, blue.
    """

    def __init__(self, config: PixelsConfig, device: str) -> None:
        self._config = config
        self._device = device
        self._steps = (Resize(config.image_size),)

    @property
    def name(self) -> str:
        return self.card().name

    def card(self) -> ExtractorCard:
        per_side = self._config.patches_per_side()
        preprocessing = tuple(describe(self._steps))
        selection = {"patch_size": self._config.patch_size, "order": "row-major"}
        storage = {"dtype": "uint8"}
        return ExtractorCard(
            type="pixels",
            identity=identity("pixels", None, preprocessing, selection, storage),
            config=self._config.model_dump(mode="json"),
            weights=None,
            preprocessing=preprocessing,
            selection=selection,
            storage=storage,
            dtype="uint8",
            dim=self._config.patch_size**2 * 3,
            num_regions=per_side**2,
            grid=(per_side, per_side),
            boxes="grid",
            environments=(ExtractionEnvironment.here(self._device),),
        )

    def prepare(self, image: bytes) -> Prepared:
        return prepare(image, self._steps)

    def extract(self, prepared: Sequence[Prepared]) -> list[Feature]:
        return [Feature(self._patches(image.pixels), boxes=None) for image in prepared]

    def exact(self) -> Self:
        return self  # pixels are stored as they are

    def _patches(self, pixels: np.ndarray) -> np.ndarray:
        """Maps (image_size, image_size, 3) to (patches, patch_size * patch_size * 3)."""
        per_side, size = self._config.patches_per_side(), self._config.patch_size
        cut = pixels.reshape(per_side, size, per_side, size, 3).transpose(0, 2, 1, 3, 4)
        return cut.reshape(per_side**2, size * size * 3)
