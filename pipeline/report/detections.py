"""Layers that a page lays over a picture, of what a detector found in it."""

import base64
import colorsys
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.read.features import FeatureBatch

NUM_TAGS = 8  # more would hide the picture
TAG_WIDTH, TAG_HEIGHT = 30.0, 7.0  # percent that one takes of a thumbnail of this shape:
USUAL_RATIO = 4 / 3
NUM_MASKS = 12
MASK_ALPHA = 130  # of 255


@dataclass(frozen=True)
class Tag:
    """A region's label above the corner of its box, in percent of the picture."""

    text: str
    left: float
    top: float  # where the tag ends and the box begins


@dataclass(frozen=True)
class Found:
    """The layers of one picture."""

    tags: tuple[Tag, ...]
    masks: str  # the URL of an image that holds its own bytes; empty without masks


def found(
    batch: FeatureBatch,
    index: int,
    names: Sequence[str] | None,
    masks: Sequence[Mapping[str, Any]] | None,
    ratio: float,
) -> Found | None:
    """Returns the layers of a batch's sample, or None if its regions have no labels.

    `names` are those of the classes; without them, regions are called by number. The surest are
    tagged, but none over another's tag. `ratio` is the picture's width / height.
    """
    if batch.labels is None:
        return None
    count = int(batch.num_regions[index])
    labels = batch.labels[index, :count]
    scores = np.ones(count, np.float32) if batch.scores is None else batch.scores[index, :count]
    order = np.argsort(-scores, kind="stable")
    width = min(100.0, TAG_WIDTH * max(1.0, USUAL_RATIO / ratio))
    height = min(100.0, TAG_HEIGHT * max(1.0, ratio / USUAL_RATIO))
    tags: list[Tag] = []
    for region in order.tolist():
        text = f"{_name(int(labels[region]), names)} {scores[region]:.2f}"
        left, top = (round(100 * float(edge), 2) for edge in batch.boxes[index, region, :2])
        tag = Tag(text, min(left, 100 - width), max(top, height))
        apart = (
            abs(tag.left - other.left) >= width or abs(tag.top - other.top) >= height
            for other in tags
        )
        if len(tags) < NUM_TAGS and all(apart):
            tags.append(tag)
    return Found(
        tuple(tags), _mask_layer([masks[i] for i in order[:NUM_MASKS].tolist()]) if masks else ""
    )


def _name(label: int, names: Sequence[str] | None) -> str:
    return names[label] if names and label < len(names) else f"class {label}"


def _mask_layer(masks: Sequence[Mapping[str, Any]]) -> str:
    """Draws masks, the most certain first, each in a colour of its own, over each other."""
    from pycocotools.mask import decode

    bits: NDArray[np.uint8] = decode([dict(mask) for mask in masks])  # (H, W, masks)
    levels = np.zeros(bits.shape[:2], np.uint8)
    for number in reversed(range(bits.shape[2])):
        levels[bits[:, :, number] > 0] = number + 1
    layer = Image.fromarray(levels, mode="P")
    colours = [colorsys.hsv_to_rgb(number * 0.618 % 1, 0.75, 1) for number in range(len(masks))]
    layer.putpalette([0, 0, 0, *(round(255 * part) for colour in colours for part in colour)])
    buffer = io.BytesIO()
    layer.save(buffer, "PNG", transparency=bytes([0] + [MASK_ALPHA] * len(masks)))
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
