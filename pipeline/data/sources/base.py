"""The interface of a source: files in somebody's format, listed as records.

Listing reads annotation files and folder listings; image bytes are read later, one record at a
time, where the shard is written.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import msgspec
import xxhash

from pipeline import storage
from pipeline.config import Config
from pipeline.data.sample import EncodedTexts, Texts
from pipeline.data.tars.foreign_tar import ForeignTar
from pipeline.errors import SourceError
from pipeline.reason import Reason


class Record(
    msgspec.Struct, frozen=True, omit_defaults=True
):  # a dataclass takes ten times as long to make
    """One image with its texts, found in a source and not yet read.

    `image` is a locator that the same source's `read` understands. `suffix` names the image
    part (`jpg`, `png`, `webp`). `image_fingerprint` comes of `fingerprint`. `detail` says what was
    left out of the texts, if anything. Where the image is to be left where it lies, `tar` is that
    tar, with the image's offset and size in it, in bytes. `num_entries` of the source's index went
    into it: rows, files. `perceptual_hash` is known once an ingest has looked at the image for it.
    """

    key: str
    split: str
    image: str
    suffix: str
    texts: EncodedTexts
    image_fingerprint: str
    detail: str = ""
    tar: ForeignTar | None = None
    image_offset: int = -1
    image_size: int = -1
    num_entries: int = 1
    perceptual_hash: int | None = None

    @property
    def texts_fingerprint(self) -> str:
        """What tells whether its texts have changed since it was last read."""
        return self.texts.fingerprint()


class Reject(msgspec.Struct, frozen=True):
    """A record that cannot become a sample; `detail` names the fault.

    A record rejected here is looked at again when a fingerprint or the reason changes. `remains` is
    what there is of it, the image (else "") or the texts: another source may have the rest. `tar`
    and `num_entries` are those of a record.
    """

    key: str
    split: str
    reason: Reason
    detail: str
    image_fingerprint: str
    texts_fingerprint: str
    remains: Record | None = None
    tar: ForeignTar | None = None
    num_entries: int = 1


class Source(Protocol):
    """A listing of records and a way to read their images. It is sent to workers by pickle."""

    def records(self) -> Iterator[Record | Reject]:
        """Lists every record; raises SourceError if the files are not what they should be.

        Keys come from `safe_key` and do not depend on the order or number of records. A key
        that is listed twice makes the second record a `duplicate-id` reject.
        """
        ...

    def read(self, record: Record) -> bytes:
        """Returns the image's bytes.

        Raises SourceError if this image cannot be had, which rejects the record, and
        StorageError if reading failed for a passing reason, which stops the run.
        """
        ...


@runtime_checkable
class IndexedSource(Source, Protocol):
    """A source that can tell how many entries it has without making records of them."""

    def index(self) -> Mapping[str, int]:
        """Returns the number of entries by file or folder; called once all are listed.

        Counted by other means than `records` has, as far as they are cheap: what a file says of
        itself, its lines, the names in a folder.
        """
        ...


def accounted(source: Source) -> Iterator[Record | Reject]:
    """Yields what a source lists, and raises SourceError if entries of its index are in nothing."""
    require_readable(source)
    num_entries = 0
    for entry in source.records():
        num_entries += entry.num_entries
        yield entry
    if isinstance(source, IndexedSource):
        require_accounted(source.index(), num_entries)


def require_readable(source: Source) -> None:
    """Raises SourceError if a location of the settings is neither a file nor a folder."""
    if isinstance(source, ConfiguredSource):
        for key, location in source.config.locations().items():
            if storage.exists(location) and not storage.is_readable(location):
                raise SourceError(f"{key}: {location}: it is neither a file nor a folder")


def require_accounted(index: Mapping[str, int], num_entries: int) -> None:
    """Raises SourceError if records and rejects hold other than the entries that files have."""
    expected = sum(index.values())
    if num_entries != expected:
        counts = ", ".join(f"{location} has {number}" for location, number in index.items())
        raise SourceError(
            f"{counts}: of {expected} entries, {num_entries} are in records or rejects; "
            "nothing was changed. If a file was written to meanwhile, the same command does "
            "it; else the source is read wrongly, and that is a bug worth a report"
        )


@runtime_checkable
class ConfiguredSource(Source, Protocol):
    """A source that a recipe's settings have made."""

    config: "SourceConfig"


@dataclass(frozen=True)
class ListedTar:
    """A tar of a source, and the split its samples are for: "" if their keys decide."""

    tar: ForeignTar  # whose `listing` tells the settings by which it is listed
    split: str


@runtime_checkable
class TarSource(Source, Protocol):
    """A source that lists tar by tar, and may leave the images where they lie."""

    in_place: bool

    def tars(self) -> Iterator[ListedTar]:
        """Lists the tars by a look at their folders, and opens none."""
        ...

    def samples(self, listed_tar: ListedTar) -> Iterator[Record | Reject]:
        """Lists the samples of a tar in their order."""
        ...


class SourceConfig(Config):
    """The base of a source's settings: a subclass adds its `type` tag and its fields."""

    def build(self) -> Source:
        """Returns the source; opens nothing yet."""
        raise NotImplementedError

    def locations(self) -> dict[str, str]:
        """Returns the files and folders the source reads, by the key that names each."""
        return {}

    def leaves_images(self) -> bool:
        """Whether images stay in tars of others, where none can be encoded anew."""
        return False


Locations = str | list[str] | Mapping[str, str | list[str]]


def by_key(**given: Locations | None) -> dict[str, str]:
    """Returns the locations of settings that are one, several, or some for each split, or null."""
    found: dict[str, str] = {}
    for key, value in given.items():
        if isinstance(value, str):
            found[key] = value
        elif value is not None:
            parts = value.items() if isinstance(value, Mapping) else enumerate(value)
            for part, location in parts:
                found |= by_key(**{f"{key}.{part}": location})
    return found


def fingerprint(image: str) -> str:
    """Returns what tells whether an image has changed since it was last read.

    `image` is anything that changes when the image's bytes do: size and modification time, an
    object's version, a digest, the seed and version of a generator.
    """
    return xxhash.xxh3_64_hexdigest(image.encode())


def refused(record: Record, reason: Reason, detail: str) -> Reject:
    """Returns the reject of a record, which remains in it."""
    return Reject(
        key=record.key,
        split=record.split,
        reason=reason,
        detail=detail,
        image_fingerprint=record.image_fingerprint,
        texts_fingerprint=record.texts_fingerprint,
        remains=record,
        tar=record.tar,
        num_entries=record.num_entries,
    )


def without_texts(
    texts: Texts, key: str, split: str, reason: Reason, detail: str, image: str
) -> Reject:
    """Returns the reject of what nothing is written about, as its `texts` say.

    `image` is that of `fingerprint`.
    """
    texts_fingerprint = texts.encoded().fingerprint()
    return Reject(key, split, reason, detail, fingerprint(image), texts_fingerprint)


_MAX_DETAIL = 1000  # characters
_MAX_READABLE = 60


def malformed(
    where: str, split: str, detail: str, reason: Reason = Reason.MALFORMED_RECORD
) -> Reject:
    """Returns the reject of a record that is not what its format says, and so has no key.

    `where` is its file and its place in it, such as `captions.json: annotations[5]`.
    """
    split = split or "train"
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", where.rpartition("/")[2])[:_MAX_READABLE].strip("-")
    key = f"{readable}-{xxhash.xxh3_64_hexdigest(f'{split} {where}'.encode())}"
    printable = detail[:_MAX_DETAIL].encode("utf-8", "backslashreplace").decode()
    return without_texts(Texts(key), key, split, reason, printable, printable)


def in_validation(key: str, fraction: float) -> bool:
    """Whether a key falls into the validation split: a pure function of both arguments.

    A key that is in a fraction is in every larger one, and other keys never matter.
    """
    return xxhash.xxh3_64_intdigest(f"split:{key}".encode()) < fraction * 2**64
