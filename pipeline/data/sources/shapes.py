"""The `shapes` source: procedural scenes listed from a seed, drawn when they are read.

It needs no download: the quickstart's model learns to see from these.
"""

import io
import math
import random
from collections.abc import Iterator
from typing import Literal

from PIL import Image, ImageDraw
from pydantic import Field

from pipeline.data.sources.base import Record, SourceConfig, fingerprint
from pipeline.data.sources.shapes_scene import (
    CELLS_PER_SIDE,
    Scene,
    SplitName,
    Thing,
    sample_scene,
)
from pipeline.data.sources.shapes_texts import texts_of
from pipeline.errors import SourceError

REVISION = 2  # part of every fingerprint: raise it when the same scene is drawn differently


class ShapesSourceConfig(SourceConfig):
    """How many scenes there are, and how large they are drawn."""

    type: Literal["shapes"] = Field(
        description="scenes of coloured shapes, drawn from a seed: no download"
    )
    scenes: int = Field(ge=1, description="in the split `train`")
    validation_scenes: int = Field(
        ge=0, description="in the split `validation`: placings new to it"
    )
    image_size: int = Field(default=128, ge=32, le=1024, description="pixels a side")
    seed: int = Field(default=0, ge=0, description="what the scenes are drawn from")

    def build(self) -> "ShapesSource":
        return ShapesSource(self)


class ShapesSource:
    """Scenes that are pure functions of (seed, split, index); nothing is on disk.

    Scene n does not depend on how many there are, so a longer list keeps the shorter one's records.
    """

    def __init__(self, config: ShapesSourceConfig) -> None:
        self.config = config

    def records(self) -> Iterator[Record]:
        """Lists the training scenes, then the validation scenes, without drawing any."""
        splits: tuple[tuple[SplitName, int], ...] = (
            ("train", self.config.scenes),
            ("validation", self.config.validation_scenes),
        )
        for split, number in splits:
            for index in range(number):
                yield self._record(split, index)

    def read(self, record: Record) -> bytes:
        """Draws the record's scene as a JPEG, the same bytes each time."""
        for split in ("train", "validation"):
            if record.split == split and record.image.isdecimal():
                return draw(
                    sample_scene(self.config.seed, split, int(record.image)), self.config.image_size
                )
        raise SourceError(
            f"{record.key}: no scene {record.image!r} of split {record.split!r}; "
            "expected an index in train or validation"
        )

    def _record(self, split: SplitName, index: int) -> Record:
        seed, size = self.config.seed, self.config.image_size
        key = f"shapes-{split}-{index:06d}"
        scene = sample_scene(seed, split, index)
        texts = texts_of(scene, key, random.Random(f"texts/{seed}/{split}/{index}"))
        return Record(
            key=key,
            split=split,
            image=str(index),
            suffix="jpg",
            texts=texts.encoded(),
            image_fingerprint=fingerprint(f"{REVISION} {size} {scene!r}"),
        )


# Drawing

_RGB = {
    "red": (240, 84, 84),
    "yellow": (250, 214, 84),
    "green": (84, 208, 112),
    "blue": (92, 144, 255),
    "purple": (190, 96, 250),
    "white": (244, 244, 244),
}
_DIAMETERS = {"large": 0.86, "small": 0.54}  # of a cell's side
_OVERSAMPLING = 4  # outlines are drawn this much larger, then averaged down

# Outlines in a square from -1 to 1, y down.
_POLYGONS = {
    "square": ((-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)),
    "triangle": ((0.0, -0.95), (0.98, 0.82), (-0.98, 0.82)),
    "star": (
        (0.0, -1.0), (0.26, -0.33), (0.98, -0.31), (0.42, 0.14), (0.61, 0.83),
        (0.0, 0.44), (-0.61, 0.83), (-0.42, 0.14), (-0.98, -0.31), (-0.26, -0.33),
    ),
    "cross": (
        (-0.33, -0.98), (0.33, -0.98), (0.33, -0.33), (0.98, -0.33), (0.98, 0.33), (0.33, 0.33),
        (0.33, 0.98), (-0.33, 0.98), (-0.33, 0.33), (-0.98, 0.33), (-0.98, -0.33), (-0.33, -0.33),
    ),
}  # fmt: skip


def draw(scene: Scene, image_size: int) -> bytes:
    """Returns a square JPEG of the scene, `image_size` pixels a side."""
    picture = Image.new("RGB", (image_size, image_size), scene.background)
    for thing in scene.things:
        corner, mask = _mask(thing, image_size)
        picture.paste(_shaded(_RGB[thing.color], thing.shade), corner, mask)
    payload = io.BytesIO()
    picture.save(payload, "JPEG", quality=92, subsampling=0)
    return payload.getvalue()


def _mask(thing: Thing, image_size: int) -> tuple[tuple[int, int], Image.Image]:
    """Returns the thing's anti-aliased coverage of the pixels around it, and their left and top."""
    cell = image_size / CELLS_PER_SIDE
    x = (thing.column + 0.5 + thing.offset[0]) * cell
    y = (thing.row + 0.5 + thing.offset[1]) * cell
    side = math.ceil(cell)
    left, top = round(x - side / 2), round(y - side / 2)
    centre_x, centre_y = (x - left) * _OVERSAMPLING, (y - top) * _OVERSAMPLING
    radius = _DIAMETERS[thing.size] * cell / 2 * _OVERSAMPLING
    mask = Image.new("L", (side * _OVERSAMPLING, side * _OVERSAMPLING))
    pen = ImageDraw.Draw(mask)
    if thing.shape in _POLYGONS:
        corners = [
            (centre_x + radius * u, centre_y + radius * v) for u, v in _POLYGONS[thing.shape]
        ]
        pen.polygon(corners, fill=255)
    else:
        pen.circle((centre_x, centre_y), radius * 0.95, fill=255)
        if thing.shape == "ring":
            pen.circle((centre_x, centre_y), radius * 0.5, fill=0)
    return (left, top), mask.resize((side, side), Image.Resampling.BOX)


def _shaded(color: tuple[int, int, int], shade: float) -> tuple[int, int, int]:
    red, green, blue = (min(255, round(level * shade)) for level in color)
    return red, green, blue
