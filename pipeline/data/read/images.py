"""The reader of live pictures: batches of pixels, decoded from the images in the shards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipeline.config import Config
from pipeline.data.media.augmentation import AugmentConfig, View, random_view
from pipeline.data.media.decoding import Picture
from pipeline.data.media.image_check import BadImageError
from pipeline.data.media.image_pixels import Pixels, reduction
from pipeline.data.read.buffers import BufferPool
from pipeline.data.read.features import FeatureBatch, grid_boxes
from pipeline.data.read.rows import Located
from pipeline.data.sample import Texts
from pipeline.data.tars.members import Members, Places
from pipeline.errors import ConfigError, ShardError


class ImageConfig(Config):
    """How photographs become pixels of one size."""

    size: int = Field(default=224, ge=1, le=4096)  # pixels a side; proportions are not kept
    augment: AugmentConfig | None = None  # None: the whole picture, always the same


class LiveConfig(Config):
    """Pictures where other splits have stored features: decoded when they are asked for.

    Each is given as a grid of regions. With `patches` a region is the pixels of its own square,
    for a model that learns from them; else the pixels are given whole, beside regions without
    values, for a network in the model that makes the values of them.
    """

    images: ImageConfig
    grid: tuple[int, int]  # rows and columns
    patches: bool

    def whole(self) -> "LiveConfig":
        """Returns it without augmentation, as held-out pictures are seen."""
        return self.model_copy(update={"images": self.images.model_copy(update={"augment": None})})


@dataclass(frozen=True)
class ImageBatch:
    """B pictures, each scaled to S × S pixels."""

    pixels: npt.NDArray[np.uint8]  # (B, S, S, 3), red, green, blue

    @classmethod
    def empty(cls, count: int, size: int, pool: BufferPool) -> "ImageBatch":
        """Returns room for `count` pictures."""
        return cls(pool.empty((count, size, size, 3), np.uint8))

    def patches(self, patch_size: int) -> FeatureBatch:
        """Cuts the pictures into squares, for a model that reads pixels where others read features.

        As the `pixels` extractor stores them: row by row, and within a patch its pixels row by
        row. Boxes are fractions of what is seen. Raises ConfigError if squares do not fit.
        """
        count, size = self.pixels.shape[:2]
        per_side, rest = divmod(size, patch_size)
        if rest:
            raise ConfigError(f"image size {size} is not a multiple of patch_size={patch_size}")
        cut = self.pixels.reshape(count, per_side, patch_size, per_side, patch_size, 3)
        values = cut.transpose(0, 1, 3, 2, 4, 5).reshape(count, per_side**2, -1)
        boxes = np.tile(grid_boxes(per_side, per_side), (count, 1, 1))
        return FeatureBatch(values, boxes, np.full(count, per_side**2, np.int32))

    def whole(self, grid: tuple[int, int]) -> FeatureBatch:
        """Returns the pictures beside the cells of a grid, whose values a network has yet to make.

        Boxes are fractions of what is seen.
        """
        count, num_regions = len(self.pixels), grid[0] * grid[1]
        return FeatureBatch(
            np.empty((count, num_regions, 0), np.float32),
            np.tile(grid_boxes(*grid), (count, 1, 1)),
            np.full(count, num_regions, np.int32),
            pixels=self.pixels,
        )

    def regions(self, config: LiveConfig) -> FeatureBatch:
        """Returns the pictures as features; raises ConfigError if patches are not the grid."""
        if not config.patches:
            return self.whole(config.grid)
        patches = self.patches(config.images.size // config.grid[1])
        if patches.num_regions[0] != config.grid[0] * config.grid[1]:
            raise ConfigError(
                f"{config.images.size} pixels a side are not in {config.grid} patches"
            )
        return patches


class ImageReader:
    """Reads the images of any rows of a split. Any number of threads may do so at once."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._pool = BufferPool()

    def read(
        self,
        places: Places,
        config: ImageConfig,
        texts: Sequence[Texts] = (),
        rng: Callable[[int], np.random.Generator] | None = None,
    ) -> ImageBatch:
        """Decodes and scales the images that lie at B places.

        With `config.augment` each is varied by random numbers of `rng(i)`, as far as `texts[i]`
        allow it. Raises ShardError, naming file and sample, if an image cannot be had.
        """
        batch = ImageBatch.empty(len(places.files), config.size, self._pool)
        for i, payload in enumerate(self._members.read(places)):
            try:
                picture = Picture(payload)
                view = View.whole(picture.width, picture.height)
                if config.augment is not None:
                    assert rng is not None
                    view = random_view(
                        config.augment, picture.width, picture.height, texts[i], rng(i)
                    )
                render(picture, view, batch.pixels[i])
            except BadImageError as error:
                raise ShardError(f"{self._members.where(places, i)}: {error}") from error
        return batch

    def fetch(self, places: Places) -> None:
        """Brings the files of these places, where they are far away, into the cache."""
        self._members.fetch(places)


class LiveReader:
    """Makes features of the images of any rows of a split, as they are asked for."""

    def __init__(self, pictures: ImageReader, config: LiveConfig) -> None:
        self.is_augmented = config.images.augment is not None
        self._pictures = pictures
        self._config = config

    def read(
        self,
        located: Located,
        texts: Sequence[Texts] = (),
        rng: Callable[[int], np.random.Generator] | None = None,
    ) -> FeatureBatch:
        """Returns whole pictures or B × R patches; texts and rng are as of `ImageReader.read`."""
        return self._pictures.read(
            located.places("image"), self._config.images, texts, rng
        ).regions(self._config)

    def fetch(self, located: Located) -> None:
        """Brings the files of these rows, where they are far away, into the cache."""
        self._pictures.fetch(located.places("image"))

    def masks(self, located: Located) -> list[dict[str, Any]] | None:  # noqa: ARG002
        """Returns None: pictures come without outlines."""
        return None


def live_features(payload: bytes, config: LiveConfig) -> FeatureBatch:
    """Returns the features of one image (B = 1), seen whole; raises BadImageError."""
    batch = ImageBatch.empty(1, config.images.size, BufferPool())
    picture = Picture(payload)
    render(picture, View.whole(picture.width, picture.height), batch.pixels[0])
    return batch.regions(config)


def render(picture: Picture, view: View, output: Pixels) -> None:
    """Fills `output` (S, S, 3) with a part of a picture, scaled by an antialiased linear filter.

    Torch's scaling, five times as fast as Pillow's and within one level of 255 of it.
    """
    import torch

    size = len(output)
    by = reduction(view.right - view.left, view.bottom - view.top, size)
    pixels = picture.pixels(by)
    scale_x, scale_y = pixels.shape[1] / picture.width, pixels.shape[0] / picture.height
    left, right = (round(x * scale_x) for x in (view.left, view.right))
    top, bottom = (round(y * scale_y) for y in (view.top, view.bottom))
    part = pixels[top : max(bottom, top + 1), left : max(right, left + 1)]
    part = part[:, ::-1].copy() if view.is_mirrored else np.ascontiguousarray(part)
    # As (1, 3, S, S) views by the fewest calls of torch: each lets other threads have the
    # interpreter, and may have to wait for it.
    source, target = (torch.from_numpy(array[None]).permute(0, 3, 1, 2) for array in (part, output))
    # What `interpolate` calls, which has no `out` and returns planes: three times the cost.
    torch.ops.aten._upsample_bilinear2d_aa.out(
        source, [size, size], align_corners=False, scales_h=None, scales_w=None, out=target
    )
