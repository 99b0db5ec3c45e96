"""Row numbers to batches of pixels, decoded from the images as they lie in the shards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipeline.config import Config
from pipeline.data.augmentation import AugmentConfig, View, random_view
from pipeline.data.buffers import BufferPool
from pipeline.data.decoding import Picture
from pipeline.data.features import FeatureBatch, grid_boxes
from pipeline.data.image_check import BadImageError
from pipeline.data.image_pixels import Pixels, reduction
from pipeline.data.members import Int64Array, Members
from pipeline.data.sample import Texts
from pipeline.errors import ConfigError, ShardError


class ImageConfig(Config):
    """How photographs become pixels of one size."""

    size: int = Field(default=224, ge=1, le=4096)  # pixels a side; proportions are not kept
    augment: AugmentConfig | None = None  # None: the whole picture, always the same


@dataclass(frozen=True)
class ImageBatch:
    """B pictures, each scaled to S × S pixels."""

    pixels: npt.NDArray[np.uint8]  # (B, S, S, 3), red, green, blue
    views: npt.NDArray[np.float32]  # (B, 4) what is seen: x1, y1, x2, y2, fractions of the picture
    mirrored: npt.NDArray[np.bool_]  # (B,) whether left and right are exchanged

    @classmethod
    def empty(cls, count: int, size: int, pool: BufferPool) -> "ImageBatch":
        """Returns room for `count` pictures."""
        return cls(
            pool.empty((count, size, size, 3), np.uint8),
            np.empty((count, 4), np.float32),
            np.empty(count, np.bool_),
        )

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


class ImageReader:
    """Reads the images of any rows of a split. Any number of threads may do so at once."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._pool = BufferPool()

    def read(
        self,
        rows: Int64Array,
        config: ImageConfig,
        texts: Sequence[Texts] = (),
        rng: Callable[[int], np.random.Generator] | None = None,
    ) -> ImageBatch:
        """Decodes and scales the images of B rows.

        With `config.augment` each is varied by random numbers of `rng(i)`, as far as `texts[i]`
        allow it. Raises ShardError, naming file and sample, if an image cannot be had.
        """
        batch = ImageBatch.empty(len(rows), config.size, self._pool)
        for i, payload in enumerate(self._members.read(rows)):
            try:
                picture = Picture(payload)
                width, height = picture.width, picture.height
                view = View.whole(width, height)
                if config.augment is not None:
                    assert rng is not None
                    view = random_view(config.augment, width, height, texts[i], rng(i))
                render(picture, view, batch.pixels[i])
            except BadImageError as error:
                row = int(rows[i])
                raise ShardError(
                    f"{self._members.location(row)}: sample {self._members.keys[row]!r}: {error}"
                ) from error
            edges = (view.left, view.top, view.right, view.bottom)
            batch.views[i] = np.divide(edges, (width, height, width, height))
            batch.mirrored[i] = view.is_mirrored
        return batch


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
    source, target = (torch.from_numpy(array).permute(2, 0, 1)[None] for array in (part, output))
    # What `interpolate` calls, which has no `out` and returns planes: three times the cost.
    torch.ops.aten._upsample_bilinear2d_aa.out(
        source, [size, size], align_corners=False, scales_h=None, scales_w=None, out=target
    )
