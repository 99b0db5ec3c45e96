"""References to images that stay in somebody else's tar, in one version of it.

Such a tar is read by position and never written. A shard of ours stands for its samples: it holds
their texts and, in place of each image, a reference. So features, versions and `compact` deal in
shards of ours alone, whatever becomes of the tar.
"""

import os
from typing import Self

import msgspec

from pipeline.digest import digest_of
from pipeline.errors import ShardError

REFERENCE = ".ref"  # ends the name of a part that stands for an image


class ForeignTar(msgspec.Struct, frozen=True):
    """A tar as it was when it was indexed."""

    location: str  # absolute
    stamp: str  # as `storage.stamp` gives it: it changes when the tar does
    listing: str = ""  # tells the settings apart by which it was listed
    num_records: int = -1  # that were listed of it; -1 before it is listed

    def __str__(self) -> str:
        return self.location

    def check_stamp(self, found: str) -> None:
        """Raises ShardError unless the tar is still the one that was indexed."""
        if found != self.stamp:
            raise ShardError(
                f"{self.location}: the tar has changed since it was indexed (size and time, or "
                f"version, were {self.stamp}, are {found}); ingest again, then extract"
            )


Location = str | ForeignTar  # of a file that holds samples: ours, or somebody else's


class ImageReference(msgspec.Struct, frozen=True):
    """Where in the tar an image lies, in bytes, and the xxh3_128 of it in hex."""

    offset: int
    size: int
    digest: str

    def read(self, descriptor: int) -> bytes:
        """Returns the image from its open tar; raises ShardError if it is not there as it was."""
        try:
            image = os.pread(descriptor, self.size, self.offset)
        except OSError as error:
            raise ShardError(f"the image at byte {self.offset} cannot be read ({error})") from error
        found = digest_of(image)
        if found != self.digest:
            raise ShardError(
                f"expected an image of {self.size} bytes at byte {self.offset} with the digest "
                f"{self.digest}, found {len(image)} bytes with {found}; the tar was replaced: "
                "ingest again, then extract"
            )
        return image

    def to_json(self) -> bytes:
        """Returns JSON, the same for the same reference."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, payload: bytes) -> Self:
        """Reads what `to_json` wrote, or raises ShardError."""
        try:
            return msgspec.json.decode(payload, type=cls)
        except msgspec.DecodeError as error:
            raise ShardError(f"not a reference to an image ({error}): {payload[:60]!r}") from error
