"""The filters of a dataset: images and captions that a recipe does not want.

Each image left out is a reject with its own reason, and so is a record of which no text is left:

- `too-small`: the shorter side of the image, as it came, is under `min_shorter_side`.
- `extreme-aspect`: its longer side is over `max_aspect_ratio` times the shorter one.
- `caption-length`: all its captions have too few words or too many, and it has no questions and
  no dialogs. Captions are dropped one by one: a record keeps those that fit.
- `duplicate-image`, `near-duplicate`: see `duplicates`.
- `animated-image`: see `reencode`.

The size of a video or a folder of frames is that of its first frame. Copies of them, and of DICOM
images, are known by their bytes alone: `near` compares no frames.
"""

import dataclasses
from typing import Literal, Self

from msgspec.structs import replace
from pydantic import Field, PositiveInt, model_validator

from pipeline.config import Config
from pipeline.data.media.image_check import BadImageError
from pipeline.data.sources.base import Record, Reject, refused
from pipeline.reason import Reason

# Rejects for these reasons were asked for: they are no sign of a run that is going wrong.
WANTED_REASONS = frozenset(
    {
        Reason.TOO_SMALL,
        Reason.EXTREME_ASPECT,
        Reason.CAPTION_LENGTH,
        Reason.DUPLICATE_IMAGE,
        Reason.NEAR_DUPLICATE,
        Reason.ANIMATED_IMAGE,
    }
)


class FilterConfig(Config):
    """What is left out; by default nothing."""

    min_shorter_side: PositiveInt | None = Field(
        default=None,
        description="pixels of an image's shorter side, before any encoding anew; null: any",
    )
    max_aspect_ratio: float | None = Field(
        default=None, ge=1, description="longer side by shorter; null: any"
    )
    min_caption_words: PositiveInt | None = Field(
        default=None, description="fewest words of a caption, which are what spaces part; null: any"
    )
    max_caption_words: PositiveInt | None = Field(
        default=None, description="most words of a caption; null: any"
    )
    duplicates: Literal["keep", "exact", "near"] = Field(
        default="keep",
        description="which images are left out: `exact` those whose files have the same bytes "
        "as another's, `near` also those that look alike",
    )
    near_distance: int = Field(
        default=4,
        ge=1,
        le=10,
        description="of the 64 bits of two perceptual hashes, how many may differ where images "
        "look alike",
    )

    @model_validator(mode="after")
    def _some_length_fits(self) -> Self:
        least, most = self.min_caption_words, self.max_caption_words
        if least is not None and most is not None and least > most:
            raise ValueError(f"min_caption_words={least} is over max_caption_words={most}")
        return self

    def check_size(self, width: int, height: int) -> None:
        """Raises BadImageError if an image of this size in pixels is not wanted."""
        if self.min_shorter_side is None and self.max_aspect_ratio is None:
            return
        shorter, longer = sorted((width, height))
        if self.min_shorter_side is not None and shorter < self.min_shorter_side:
            detail = f"{width}x{height}, min_shorter_side is {self.min_shorter_side}"
            raise BadImageError(Reason.TOO_SMALL, detail)
        if self.max_aspect_ratio is not None and longer > self.max_aspect_ratio * shorter:
            detail = f"{width}x{height}, max_aspect_ratio is {self.max_aspect_ratio:g}"
            raise BadImageError(Reason.EXTREME_ASPECT, detail)

    @property
    def has_caption_rule(self) -> bool:
        """Whether any caption could be dropped."""
        return self.min_caption_words is not None or self.max_caption_words is not None

    def captioned(self, record: Record) -> Record | Reject:
        """Returns a record with the captions of a wanted length, or a reject if no text is left."""
        written = record.texts.decode()
        captions = written.captions
        kept = tuple(caption for caption in captions if self._fits(caption))
        if len(kept) == len(captions):
            return record
        texts = dataclasses.replace(written, captions=kept).encoded()
        record = replace(record, texts=texts)
        dropped = f"{len(captions) - len(kept)} captions of unwanted length dropped"
        if not texts.num_texts:
            return refused(record, Reason.CAPTION_LENGTH, dropped)
        return replace(record, detail=f"{record.detail}, {dropped}" if record.detail else dropped)

    def _fits(self, caption: str) -> bool:
        num_words = len(caption.split())
        least, most = self.min_caption_words or 0, self.max_caption_words
        return num_words >= least and (most is None or num_words <= most)
