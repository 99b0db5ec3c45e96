"""The image policy: how a file is checked, filtered and encoded anew before it is stored.

What becomes of a file depends on these settings alone, so they are part of what tells whether a
sample has to be made again.
"""

import json
from dataclasses import dataclass, field

from pipeline.data.ingest.filters import FilterConfig
from pipeline.data.media.image_check import Verify
from pipeline.data.media.kind import is_picture
from pipeline.data.media.media_check import check_media
from pipeline.data.media.reencode import SUFFIX, ReencodeConfig, StoredImage, reencode
from pipeline.data.sources.image_files import MEDIA

# Raised when the same settings make other pixels, so that what was stored is made again.
_METHOD = 1


@dataclass(frozen=True)
class ImagePolicy:
    """The settings. By default images are stored as they came; videos and DICOM always are."""

    verify: Verify = "decode"
    reencode: ReencodeConfig | None = None
    filters: FilterConfig = field(default_factory=FilterConfig)

    def identity(self) -> str:
        """Returns what differs if other images may be stored, or rejected: empty by default."""
        filters = self.filters.model_dump(
            exclude={"min_caption_words", "max_caption_words"}, exclude_defaults=True
        )
        if self.reencode is None and not filters:
            return ""
        encoding = self.reencode and self.reencode.model_dump()
        return json.dumps([_METHOD, encoding, filters], sort_keys=True)

    def suffix(self, suffix: str) -> str:
        """Returns the suffix of the image part, given that of the file."""
        return suffix if self.reencode is None or suffix in MEDIA else SUFFIX

    def examine(self, payload: bytes) -> tuple[int, int]:
        """Returns the file's width and height in pixels, or raises BadImageError with the reason.

        Says all that `apply` has against a file, but for what only encoding it anew can find.
        """
        width, height = check_media(payload, self.verify)
        self.filters.check_size(width, height)
        return width, height

    def apply(self, payload: bytes) -> StoredImage:
        """Returns what is stored for a file, or raises BadImageError with the reason."""
        if self.reencode is None or not is_picture(payload):
            return StoredImage(payload, *self.examine(payload))
        self.filters.check_size(*check_media(payload, "header"))
        return reencode(payload, self.reencode)
