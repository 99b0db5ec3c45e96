"""Random crops and mirror images, as far as what is said of a picture allows them."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from pipeline.config import Config
from pipeline.data.sample import Texts

# A text with one of these words may be wrong about the mirrored picture: it says on which side or
# which way round something is, or what is written there.
_SIDED = """
    left right leftmost rightmost lefthand righthand leftward leftwards rightward rightwards
    west east western eastern clockwise counterclockwise anticlockwise mirrored
    read reads reading say says saying spell spells write writes writing written word words
    text letter letters number numbers numeral digit digits sign signs logo label labels
    brand initials name names named title license clock watch time
"""
_SIDED_WORDS = frozenset(_SIDED.split())
_WORD = re.compile("[a-z]+")


class AugmentConfig(Config):
    """How pictures are varied from one epoch to the next: a random crop, mirrored or not."""

    area: tuple[float, float] = Field(
        default=(0.35, 1.0),
        description="least and most of the picture's area that the random crop keeps",
    )
    aspect: tuple[float, float] = Field(
        default=(3 / 4, 4 / 3), description="least and most width by height of the crop"
    )
    mirror: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="how often a picture is mirrored, of those whose texts allow it; decided by "
        "a list of English words: for other languages 0",
    )

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"area={self.area}: expected 0 < least <= most <= 1")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"aspect={self.aspect}: expected 0 < least <= most")
        return self


@dataclass(frozen=True)
class View:
    """A rectangle of a picture in whole pixels, and whether it is seen in a mirror."""

    left: int
    top: int
    right: int
    bottom: int
    is_mirrored: bool

    @classmethod
    def whole(cls, width: int, height: int) -> "View":
        return cls(0, 0, width, height, is_mirrored=False)


def random_view(
    config: AugmentConfig, width: int, height: int, texts: Texts, rng: np.random.Generator
) -> View:
    """Draws a crop of a picture of width × height pixels.

    The random resized crop of Inception (Szegedy et al., arXiv:1409.4842, section 6), of area
    evenly and of aspect evenly in its logarithm. Where that would reach beyond the picture ours is
    cut there, while torchvision's draws again; always five numbers are drawn.
    """
    area, aspect, across, down, mirror = rng.random(5)
    kept = width * height * _between(config.area, area)
    ratio = math.exp(_between((math.log(config.aspect[0]), math.log(config.aspect[1])), aspect))
    crop_width = min(max(round(math.sqrt(kept * ratio)), 1), width)
    crop_height = min(max(round(math.sqrt(kept / ratio)), 1), height)
    left = int(across * (width - crop_width + 1))
    top = int(down * (height - crop_height + 1))
    is_mirrored = bool(mirror < config.mirror) and may_be_mirrored(texts)
    return View(left, top, left + crop_width, top + crop_height, is_mirrored)


def may_be_mirrored(texts: Texts) -> bool:
    """Whether nothing that people wrote about an image becomes false in a mirror.

    Every text of the image has its say, as objectives may show another than the example's own.
    """
    return all(_SIDED_WORDS.isdisjoint(_WORD.findall(text.lower())) for text in _statements(texts))


def _statements(texts: Texts) -> Iterator[str]:
    yield from texts.captions
    for question in texts.questions:
        yield question.question
        yield from question.answers
    for dialog in texts.dialogs:
        yield dialog.caption
        for turn in dialog.rounds:
            yield turn.question
            yield turn.answer


def _between(ends: tuple[float, float], fraction: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * fraction
