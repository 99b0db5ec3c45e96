"""Other people's WebDataset tars, read where they are by position.

Members that follow each other under one name up to its first dot make one sample: `a/000.jpg`,
`a/000.txt`, `a/000.json`. The recipe maps the parts to texts: `txt`, or `json.caption` for a
field of a JSON part. Listing reads the tars' headers and the mapped parts; an image is one
positioned read of a plain tar. With `in_place` the images stay where they are, and the dataset
holds their places, digests and texts; else they are copied into shards of its own. What becomes
of each sample:

- it has an image and a text: a sample of that key. No image: `missing-image`; no text:
  `no-texts`; mapped parts that are not what the recipe says: `malformed-texts`.
- its name comes again, next to it or elsewhere: `duplicate-id`.
- its name has more dots, as `photo.2019-07-001.jpg`: by WebDataset's rule that is the part
  `2019-07-001.jpg` of `photo`. It is, with the parts of the same name up to the last dot, a sample
  of its own if it has a text of its own, or if nothing else is the image of `photo`.
- its image is a link or a device (`special-file`) or is stored in pieces (`sparse-member`).
- its name is no UTF-8: `name-not-utf8`.

Folders are passed over, and files whose name begins with a dot, as WebDataset does; so are
`__MACOSX`, `Thumbs.db` and `desktop.ini`. A tar that is damaged, cut short, or has no end stops the
run.

Tars of this project need no mapping beyond the default: it reads what it writes.
"""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import IO, Any, Literal, Self, cast

import xxhash
from msgspec.structs import replace
from pydantic import Field, model_validator

from pipeline import storage
from pipeline.data.sample import Texts
from pipeline.data.sources.base import (
    ListedTar,
    Record,
    Reject,
    SourceConfig,
    by_key,
    require_accounted,
)
from pipeline.data.sources.image_files import SUFFIXES, ImageFile, image_key, listed
from pipeline.data.sources.readers.json_file import unique_names
from pipeline.data.sources.readers.text_columns import TextColumns
from pipeline.data.sources.splits import check_splits, hash_split, validation_share
from pipeline.data.tars.foreign_tar import ForeignTar
from pipeline.data.tars.member_names import is_hidden, is_utf8, shown
from pipeline.data.tars.read_ahead import ReadAhead, ReadAheadFile
from pipeline.data.tars.tar_listing import TarMember, list_tar
from pipeline.errors import ShardError, SourceError, StorageError
from pipeline.reason import Reason

_METHOD = 3  # raised when the same settings list other samples, so that tars are listed anew
_MOST_TEXT_BYTES = 64 * 1024**2  # of a text part, which is read into memory
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MOST_TARS = 1_000_000  # of a range
_MOST_DIGITS = 18  # of a number of one
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_OWN_COLUMNS = TextColumns(
    captions=["txt", "json.captions"], questions="json.questions", dialogs="json.dialogs"
)


class WebDatasetSourceConfig(SourceConfig):
    """Where the tars are, and which of their parts hold texts."""

    type: Literal["webdataset"] = Field(description="tars of samples in WebDataset's form")
    shards: str | list[str] | dict[str, str | list[str]] = Field(
        description="a tar, a folder of tars, or a range such as `cc3m-{00000..00331}.tar`; or "
        "some by split"
    )
    image: str | list[str] = Field(
        default=list(SUFFIXES), description="the parts an image may be: the first that is there"
    )
    texts: TextColumns = Field(default=_OWN_COLUMNS, description="the parts that hold texts")
    in_place: bool = Field(
        default=True,
        description="whether the images are read where they lie from now on; false: they are "
        "copied. In place, a tar that is changed or removed takes its samples with it, and no "
        "image is encoded anew",
    )
    validation_fraction: float | None = validation_share("of shards without splits")

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        check_splits("shards", self.shards, self.validation_fraction, {})
        for suffix in self.images():
            if suffix.rpartition(".")[2].lower() not in SUFFIXES:
                raise ValueError(f"image: {suffix!r}: expected one of {', '.join(SUFFIXES)}")
        self.texts.check()
        return self

    def images(self) -> list[str]:
        """Returns the parts that may be a sample's image, the likeliest first."""
        return [self.image] if isinstance(self.image, str) else self.image

    def build(self) -> "WebDatasetSource":
        return WebDatasetSource(self)

    def leaves_images(self) -> bool:
        return self.in_place

    def locations(self) -> dict[str, str]:
        """Returns the tars and folders, the first and last of each range."""
        found = {}
        for key, location in by_key(shards=self.shards).items():
            ends = _expanded(location)
            found[key] = ends[0]
            if len(ends) > 1:
                found[f"{key}.last"] = ends[-1]
        return found


class WebDatasetSource:
    """Images and texts in tars. Memory: the parts of one sample, without its image."""

    def __init__(self, config: WebDatasetSourceConfig) -> None:
        self.config = config
        self.in_place = config.in_place
        self._remote: ReadAhead | None = None  # the tar that was read last

    def __reduce__(self) -> tuple[type["WebDatasetSource"], tuple[WebDatasetSourceConfig]]:
        return WebDatasetSource, (self.config,)

    def records(self) -> Iterator[Record | Reject]:
        """Lists the samples of every tar in their order."""
        for listed_tar in self.tars():
            yield from self.samples(listed_tar)

    def tars(self) -> Iterator[ListedTar]:
        """Lists the tars in the order they are named in, by one look at each folder."""
        self._remote = None  # it may be another one by now
        shards = self.config.shards
        stamps: dict[str, dict[str, str]] = {}  # by folder
        for split, setting in (shards if isinstance(shards, dict) else {"": shards}).items():
            for location in [setting] if isinstance(setting, str) else setting:
                for named in _expanded(storage.absolute(location)):
                    for shard in _tars(named):
                        folder, _, name = shard.rpartition("/")
                        if not is_utf8(shard):
                            raise SourceError(
                                f"{shown(shard)}: its name is not UTF-8, and manifests name tars; "
                                "rename it"
                            )
                        if folder not in stamps:
                            stamps[folder] = storage.list_stamps(folder)
                        if name not in stamps[folder]:
                            raise SourceError(
                                f"{shard}: no such file; if it is gone for good, take it out of "
                                "`shards`, and its samples leave"
                            )
                        tar = ForeignTar(shard, stamps[folder][name], self._settings(split))
                        yield ListedTar(tar, split)

    def read(self, record: Record) -> bytes:
        """Returns the image member's bytes, by a positioned read.

        Of a remote tar with its images in place, which are read in their order, by a part of one.
        """
        location, _, place = record.image.rpartition("#")
        offset, size = map(int, place.split(":"))
        try:
            if storage.is_local(location) or not self.in_place:
                return storage.read_range(location, offset, size)
            return self._read_on(location, offset, size)
        except StorageError as error:
            if storage.exists(location):
                raise
            raise SourceError(f"{location}: vanished since it was listed") from error

    def _read_on(self, location: str, offset: int, size: int) -> bytes:
        remote = self._remote
        if remote is None or remote.location != location:
            remote = self._remote = ReadAhead(location)
        image = remote.read(offset, size)
        if len(image) != size:
            raise StorageError(f"{location}: cut short: expected {size} bytes at offset {offset}")
        return image

    def samples(self, listed_tar: ListedTar) -> Iterator[Record | Reject]:
        """Lists the samples of a tar in their order.

        Raises SourceError if the tar is not whole, or has members that came into nothing.
        """
        location = listed_tar.tar.location
        num_members = num_entries = 0

        def meant(file: IO[bytes]) -> Iterator[TarMember]:
            nonlocal num_members
            for member in list_tar(file, location):
                if not is_hidden(member.name):
                    num_members += 1
                    yield member

        with _opened(location) as file:
            for name, adjacent in groupby(meant(file), _sample_name):
                for parts in _without_repeats(adjacent):
                    for entry in self._entries(name, parts, file, listed_tar):
                        num_entries += entry.num_entries
                        yield entry
        require_accounted({location: num_members}, num_entries)

    def _entries(
        self, name: str, parts: "_Parts", file: IO[bytes], listed_tar: ListedTar
    ) -> Iterator[Record | Reject]:
        """Yields what members of one name up to its first dot are: most often one sample."""
        images = self.config.images()
        rest = {part.lower(): member for part, member in parts.items()}
        by_stem: dict[str, _Parts] = {}  # of names with more dots, up to the last
        for part, member in parts.items():
            middle, dot, suffix = part.rpartition(".")
            if dot:
                by_stem.setdefault(f"{name}.{middle}", {})[suffix] = member
        pictured = [stem for stem, own in by_stem.items() if any(part in own for part in images)]
        if any(part in rest for part in images):
            own_samples = [stem for stem in pictured if self._says_something(by_stem[stem], file)]
        else:
            own_samples = list(by_stem) if pictured else []
        for stem in own_samples:
            for suffix in by_stem[stem]:
                rest.pop(f"{stem.removeprefix(f'{name}.')}.{suffix}".lower(), None)
        if rest:
            yield self._entry(name, rest, file, listed_tar)
        for stem in own_samples:
            yield self._entry(stem, by_stem[stem], file, listed_tar)

    def _says_something(self, parts: "_Parts", file: IO[bytes]) -> bool:
        try:
            return self._texts("", parts, file).num_texts > 0
        except (ValueError, TypeError):
            return True

    def _texts(self, name: str, parts: "_Parts", file: IO[bytes]) -> Texts:
        """Returns what the mapped parts say; raises ValueError or TypeError if they cannot."""
        columns = self.config.texts.columns()
        row = {
            part: _value(file, part, member)
            for part, member in parts.items()
            if any(column == part or column.startswith(f"{part}.") for column in columns)
        }
        texts = self.config.texts.texts(row, name)
        try:
            texts.to_json()
        except ShardError as error:
            raise ValueError(str(error)) from error
        return texts

    def _entry(
        self, name: str, parts: "_Parts", file: IO[bytes], listed_tar: ListedTar
    ) -> Record | Reject:
        """Returns what one sample is listed as."""
        location, split = listed_tar.tar.location, listed_tar.split
        # Moving in or out of the tar makes a sample anew.
        stamp = f"{listed_tar.tar.stamp} in place" if self.in_place else listed_tar.tar.stamp
        key, name, is_named = image_key(name), shown(name), is_utf8(name)
        image = ImageFile(f"{location}: {name}.jpg", None, None)
        offset = size = -1
        no_texts = f"{location}: {name}: nothing is written about it"
        if "." in name.rpartition("/")[2]:
            no_texts += (
                "; if it is one part of several of a sample, name it by `image`, as `left.png`"
            )
        texts, fault = Texts(name), (Reason.NO_TEXTS, no_texts)
        unusable: tuple[Reason, str] | None = None
        suffix = next((suffix for suffix in self.config.images() if suffix in parts), None)
        if not is_named:
            unusable = (Reason.NAME_NOT_UTF8, "a name that is not UTF-8; pack it under another")
        elif suffix is not None and parts[suffix].fault is not None:
            unusable = parts[suffix].fault
        elif suffix is not None:
            offset, size = parts[suffix].offset, parts[suffix].size
            place = f"{location}#{offset}:{size}"
            image = ImageFile(place, stamp, SUFFIXES[suffix.rpartition(".")[2].lower()])
        try:
            texts = self._texts(name, parts, file)
        except (ValueError, TypeError) as error:
            fault = (Reason.MALFORMED_TEXTS, f"{location}: {name}: {error}")
        entry = listed(
            key=key,
            split=split or hash_split(key, self.config.validation_fraction),
            image=image,
            texts=texts,
            fault=None if texts.num_texts else fault,
            num_entries=len(parts),
        )
        if unusable is not None and isinstance(entry, Reject):
            reason, detail = unusable
            entry = replace(entry, reason=reason, detail=f"{location}: {name}: {detail}")
        return self._left(entry, listed_tar.tar, offset, size) if self.in_place else entry

    def _left(
        self, entry: Record | Reject, tar: ForeignTar, offset: int, size: int
    ) -> Record | Reject:
        """Returns an entry whose image stays in its tar."""
        if isinstance(entry, Record):
            return replace(entry, tar=tar, image_offset=offset, image_size=size)
        remains = entry.remains and self._left(entry.remains, tar, offset, size)
        assert remains is None or isinstance(remains, Record)
        return replace(entry, tar=tar, remains=remains)

    def _settings(self, split: str) -> str:
        """Returns what differs if a tar of this split may be listed otherwise."""
        settings = self.config.model_dump_json(exclude={"shards"})
        return xxhash.xxh3_64_hexdigest(f"{_METHOD} {split} {settings}".encode())


def _opened(location: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    """Returns a file of which the images may stay unread."""
    if storage.is_local(location):
        return storage.reader(location)
    return cast(IO[bytes], ReadAheadFile(location))


def _sample_name(member: TarMember) -> str:
    folder, slash, name = member.name.rpartition("/")
    return f"{folder}{slash}{name.partition('.')[0]}".removeprefix("./")


_Parts = dict[str, TarMember]  # by what the names have behind the first dot


def _without_repeats(members: Iterator[TarMember]) -> list[dict[str, TarMember]]:
    """Returns the parts of one name: once, or as often as a part comes again."""
    found: list[dict[str, TarMember]] = []
    count: Counter[str] = Counter()
    for member in members:
        middle, dot, suffix = member.name.rpartition("/")[2].partition(".")[2].rpartition(".")
        part = f"{middle}{dot}{suffix.lower()}"
        folded = part.lower()
        if count[folded] == len(found):
            found.append({})
        found[count[folded]][part] = member
        count[folded] += 1
    return found


def _value(file: IO[bytes], part: str, member: TarMember) -> Any:
    """Returns a text part's words, or what its JSON holds."""
    if member.fault is not None:
        raise ValueError(f"{part}: {member.fault[1]}")
    if member.size > _MOST_TEXT_BYTES:
        raise ValueError(f"{part}: {member.size} bytes; the most is {_MOST_TEXT_BYTES}")
    file.seek(member.offset)
    text = file.read(member.size).decode("utf-8-sig").strip()
    if not (part == "json" or part.endswith(".json")):
        return text
    try:
        return json.loads(text, object_pairs_hook=unique_names)
    except RecursionError as error:
        raise ValueError(f"{part}: JSON that is nested too deeply") from error


def _tars(location: str) -> list[str]:
    if location.lower().endswith((".tar", ".gz", *_PACKED)):
        return [location]
    names = [name for name in storage.list_names(location) if not name.startswith(".")]
    tars = [name for name in names if name.lower().endswith(".tar")]
    if not tars:
        raise SourceError(f"{location}: expected a tar or a folder of tars, found none")
    for name in names:
        stem = next((name[: -len(end)] for end in _PACKED if name.lower().endswith(end)), None)
        if stem is not None and f"{stem}.tar" not in names:
            raise SourceError(
                f"{storage.join(location, name)}: a packed tar, which cannot be read by position, "
                "among plain ones: unpack it, or move it to another folder"
            )
    return [storage.join(location, name) for name in tars]


def _expanded(location: str) -> list[str]:
    """Returns the locations a range of numbers stands for, or the location itself."""
    span = _RANGE.search(location)
    if span is None:
        return [location]
    first, last = span.groups()
    if len(last) > _MOST_DIGITS or int(last) - int(first) >= _MOST_TARS:
        raise SourceError(f"{location}: a range of over {_MOST_TARS} tars")
    names = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    return [
        expanded
        for name in names
        for expanded in _expanded(location[: span.start()] + name + location[span.end() :])
    ]
