"""Your own table: JSONL, JSON, CSV, TSV or Parquet, with columns mapped in the recipe.

All rows of one image make one sample. An image is a path below `images`, the bytes themselves
(Parquet), or an object with `bytes` and `path` as Hugging Face datasets write it. A key is that of
the column `key`, a whole number in twelve digits as COCO's are; without the column it is the
path without its suffix. Of bytes:

- rows that repeat a path or a key are of one image if their bytes are the same.
- other bytes under the same path, as of two folders whose base names alone were kept, are images
  of their own. The keys of all of them have a digest of the bytes behind the path then: a key never
  comes to mean another image, and a night that adds the first such row removes one sample and adds
  two. A column of keys avoids that.
- bytes without a path have their digest for a key, for which all of them are read in each listing.

What becomes of the rows:

- a row that cannot be read, or whose cells are not what the recipe says: `malformed-row`.
- a row without an image or a key: `no-image`, `no-key`.
- a row of a known key with another image: `duplicate-id`.
- no row of an image has a text: `no-texts`; no file: `missing-image`; another name than an
  image's: `unknown-suffix`. A cell without bytes is an `unreadable-image` once it is read.
- an image at a URL that is neither of the table's own kind nor in `image_schemes`:
  `forbidden-location`. Nothing is fetched from there.

Rows are read one after another and gathered in a scratch file, so memory does not grow with
them but by 24 bytes a row; only a `.json` list is held as a whole.
"""

import io
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator, model_validator

from pipeline import storage
from pipeline.data.sample import Texts, safe_key
from pipeline.data.sources.base import Record, Reject, SourceConfig, by_key, malformed
from pipeline.data.sources.columns import in_batches
from pipeline.data.sources.digests import Digests, digests
from pipeline.data.sources.gathering import Gathering
from pipeline.data.sources.image_files import (
    SUFFIXES,
    ImageFile,
    ImageFolders,
    image_key,
    image_name,
    listed,
    read_image,
)
from pipeline.data.sources.readers.delimited import Quoting, TextForm
from pipeline.data.sources.readers.json_file import shown
from pipeline.data.sources.readers.tables import (
    Row,
    TablePart,
    count_rows,
    is_parquet,
    parquet_parts,
    read_cell,
    rows,
    table_files,
)
from pipeline.data.sources.readers.text_columns import TextColumns, cell, gathered
from pipeline.data.sources.splits import check_names, check_splits, hash_split, validation_share
from pipeline.data.sources.table_columns import TableColumns
from pipeline.data.tars.member_names import is_utf8
from pipeline.digest import digest_of
from pipeline.errors import ShardError, SourceError
from pipeline.reason import Reason

_CELL = "cell:"  # begins the locator of bytes in a table
_DIGEST_LENGTH = 16  # of the bytes, behind a path that several images have
_MAX_NUMBER_DIGITS = 18  # of a key that is written in decimal digits and taken for a number
_MAX_NUMBER = (1 << 63) - 1
_NEVER = ("http", "https", "ftp", "data")  # schemes of which a folder cannot be listed


class TableSourceConfig(SourceConfig):
    """Where the table is, and what its columns hold."""

    type: Literal["table"] = Field(
        description="your own table: Parquet, JSON, JSONL, CSV, TSV or text like it"
    )
    table: str | dict[str, str] = Field(
        description="a file or a folder of files, or one for each split"
    )
    image: str = Field(
        description="the column of paths, bytes or objects with both, as a dotted path"
    )
    texts: TextColumns = Field(description="the columns that hold texts")
    images: str | None = Field(
        default=None, description="the folder that paths begin in; null: the table's own"
    )
    key: str | None = Field(
        default=None, description="the column of keys; needed where bytes come without a path"
    )
    split: str | None = Field(default=None, description="the column of splits, of a single table")
    image_suffix: str = Field(default="jpg", description="of bytes that come without a path")
    delimiter: str | None = Field(
        default=None,
        description="of CSV, TSV and text like it: what stands between cells; null: a tab in "
        "`.tsv`, a comma in `.csv` (a `.txt` needs it)",
    )
    quoting: Quoting = Field(
        default="auto",
        description="of CSV, TSV and text like it: what quotation marks mean: csv: they quote; "
        "none: they are ordinary characters; auto: that of both with which all of the file can "
        "be read",
    )
    encoding: str | None = Field(
        default=None,
        description="of CSV, TSV, text like it and JSONL; null: UTF-8, or what the byte order "
        "mark says",
    )
    image_schemes: tuple[str, ...] = Field(
        default=(),
        description="what rows may name besides local files and files of the table's own kind: "
        "`s3`, `gs`, …",
    )
    validation_fraction: float | None = validation_share(
        "of a single table without a column of splits"
    )

    @field_validator("delimiter")
    @classmethod
    def _delimiter_is_one_character(cls, value: str | None) -> str | None:
        value = "\t" if value in ("\\t", "tab") else value
        if value is not None and (len(value) != 1 or value in '"\r\n\0 '):
            raise ValueError("expected one character, such as ';', '|' or '\\t' for a tab")
        return value

    @field_validator("encoding")
    @classmethod
    def _encoding_is_known(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                io.TextIOWrapper(io.BytesIO(), value)
        except (LookupError, ValueError):
            raise ValueError("expected an encoding, such as utf-8, utf-16, cp1252") from None
        return value

    @field_validator("image_schemes")
    @classmethod
    def _schemes_have_folders(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for scheme in value:
            if scheme in _NEVER or not scheme.isalnum():
                raise ValueError(
                    f"{scheme!r}: expected object stores, such as s3 or gs; download the images "
                    "of web addresses first"
                )
        return value

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        check_splits("table", self.table, self.validation_fraction, {})
        if self.split is not None and not isinstance(self.table, str):
            raise ValueError("split is a column of a single table, but table has one per split")
        if self.split is not None and self.validation_fraction is not None:
            raise ValueError("the column split and validation_fraction both say what a split is")
        if self.image_suffix not in SUFFIXES.values():
            raise ValueError(f"image_suffix: expected one of {', '.join(set(SUFFIXES.values()))}")
        self.texts.check()
        return self

    def build(self) -> "TableSource":
        return TableSource(self)

    def locations(self) -> dict[str, str]:
        return by_key(table=self.table, images=self.images)

    def columns(self) -> list[str]:
        """Returns every column the recipe names."""
        named = (self.image, self.key, self.split, *self.texts.columns())
        return list(dict.fromkeys(name for name in named if name is not None))

    def form(self) -> TextForm:
        """Returns how text files are written."""
        return TextForm(self.delimiter, self.quoting, self.encoding)


class _TableFile(NamedTuple):
    """A file of a table. `images` is the folder that its rows' paths begin in."""

    location: str
    table: str
    split: str
    images: str
    stamp: str


class TableSource:
    """Images and texts of one table or one for each split."""

    def __init__(self, config: TableSourceConfig) -> None:
        self.config = config
        self._num_rows: dict[str, int] = {}  # by file, of those that were read last

    def index(self) -> Mapping[str, int]:
        """Returns the rows of each file: as it says itself, else its lines, else as it was read."""
        form = self.config.form()
        return {
            file: num_read if (counted := count_rows(file, form)) is None else counted
            for file, num_read in self._num_rows.items()
        }

    def records(self) -> Iterator[Record | Reject]:
        """Lists the rows that cannot be used, then the images in the order of their keys' hashes.

        Raises SourceError if a column that the recipe names is in no row.
        """
        self._num_rows = {}
        with Gathering() as found:
            has_bytes = yield from self._rows(found)
            yield from self._gathered(found, has_bytes)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Lists the same: of a Parquet table with captions alone, column by column.

        A first reading finds the keys that several rows have; those rows, and odd ones, are
        gathered as in `records`. Memory: 8 bytes a row, twice for a moment, then 16 a file.
        """
        columns = self._columns()
        repeated = None if columns is None else self._repeated_keys(columns)
        if columns is None or repeated is None:
            yield from in_batches(self.records())
            return
        self._num_rows = {}
        has_bytes = False
        with Gathering() as found:
            for file in self._files():
                self._num_rows[file.location] = 0
                for part in self._parts(file, self.config.columns()):
                    self._num_rows[file.location] += part.num_rows
                    batch, is_plain = columns.listed(part, file.images, file.stamp, file.split)
                    if len(repeated) and batch.num_rows:
                        alone = ~np.isin(digests(batch.column("key")), repeated)
                        batch = batch.filter(pa.array(alone))
                        is_plain[is_plain] = alone
                    if batch.num_rows:
                        yield batch
                    odd = np.flatnonzero(~is_plain).tolist()
                    if odd:
                        has_bytes = has_bytes or bool(part.bytes_column)
                        rejects = (self._gather(part.row(i), file, found) for i in odd)
                        yield from in_batches(filter(None, rejects))
            yield from in_batches(self._gathered(found, has_bytes))

    def _columns(self) -> TableColumns | None:
        """Returns the columns by which the table can be listed, or None if it cannot."""
        config = self.config
        named = config.texts.captions or ()
        captions = (named,) if isinstance(named, str) else tuple(named)
        if {*config.texts.columns()} != {*captions}:
            return None
        for file in self._files():
            if not is_parquet(file.location) or not is_utf8(file.location + file.images):
                return None
        return TableColumns(
            image=config.image,
            captions=captions,
            key=config.key,
            split=config.split,
            image_suffix=config.image_suffix,
            validation_fraction=config.validation_fraction,
        )

    def _repeated_keys(self, columns: TableColumns) -> Digests | None:
        """Returns the digests of keys that more than one row has, or may have.

        None if only reading all images would tell.
        """
        found = [np.empty(0, np.uint64)]
        named = self.config.key or self.config.image
        for file in self._files():
            for part in self._parts(file, [named]):
                keys = columns.keys(part)
                found.append(digests(keys.drop_null()))
                for i in np.flatnonzero(np.asarray(pc.is_null(keys))).tolist():
                    try:
                        key = self._odd_key(part.row(i), file.images)
                    except (_RowError, ValueError, TypeError, ShardError):
                        continue  # such a row is in no sample
                    if key is None:
                        return None
                    found.append(digests(pa.array([key])))
        hashes = np.concatenate(found)
        hashes.sort()
        repeated: Digests = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        return repeated

    def _odd_key(self, row: Row, images: str) -> str | None:
        """Returns a row's key, or None if that is the digest of its bytes."""
        if row.values is None:
            raise _RowError(Reason.MALFORMED_ROW, row.fault)
        name = "" if self.config.key else self._image(row, images)[0]
        return self._key(row, name)[1] if name or self.config.key else None

    def _parts(self, file: "_TableFile", names: Sequence[str]) -> Iterator[TablePart]:
        return parquet_parts(file.location, names, self.config.image)

    def _files(self) -> Iterator["_TableFile"]:
        """Lists the files of the tables, each with what its rows' images depend on."""
        table, form = self.config.table, self.config.form()
        for split, location in ({"": table} if isinstance(table, str) else table).items():
            for file in table_files(storage.absolute(location), form):
                images = storage.absolute(self.config.images or file.rpartition("/")[0])
                yield _TableFile(file, location, split, images, storage.stamp(file))

    def _rows(self, found: Gathering) -> Generator[Reject, None, bool]:
        """Gathers the rows and yields those that cannot be used; returns whether any has bytes."""
        form = self.config.form()
        row, has_bytes = Row("", None), False
        for table, files in groupby(self._files(), key=lambda file: (file.split, file.table)):
            unseen = set(self.config.columns())
            for file in files:
                self._num_rows[file.location] = 0
                for row in rows(file.location, self.config.columns(), self.config.image, form):
                    self._num_rows[file.location] += 1
                    unseen -= {name for name in unseen if _holds(row.values or {}, name)}
                    has_bytes = has_bytes or bool(row.image_bytes)
                    reject = self._gather(row, file, found)
                    if reject is not None:
                        yield reject
            if unseen and not file.location.endswith(".parquet"):
                raise SourceError(
                    f"{table[1]}: no row has {', '.join(map(repr, sorted(unseen)))}; the last "
                    f"has {', '.join(map(repr, row.values or ())) or row.fault}"
                )
        return has_bytes

    def _gather(self, row: Row, file: "_TableFile", found: Gathering) -> Reject | None:
        """Gathers a row, or returns the reject of one that cannot be used."""
        where = f"{file.location}: {row.place}"
        try:
            key, entry = self._entry(row, file.images, file.stamp, file.split)
        except _RowError as fault:
            return malformed(where, file.split, f"{where}: {fault.detail}", fault.reason)
        found.add(key, entry | {"where": where})
        return None

    def _gathered(self, found: Gathering, has_bytes: bool) -> Iterator[Record | Reject]:
        """Lists what was gathered, in the order of the keys' hashes."""
        folders: dict[str, ImageFolders] = {}
        with Gathering() as told_apart:
            if has_bytes:
                yield from _tell_apart(found, told_apart)
            for key, entries in (told_apart if has_bytes else found).groups():
                yield from self._records(key, entries, folders)

    def read(self, record: Record) -> bytes:
        """Returns the bytes of the image file or of the table's cell."""
        if record.image.startswith(_CELL):
            return read_cell(record.image.removeprefix(_CELL))
        return read_image(record)

    def _entry(self, row: Row, images: str, stamp: str, split: str) -> tuple[str, dict[str, Any]]:
        """Returns a row's key and what it says; raises _RowError if it cannot be used."""
        config = self.config
        if row.values is None:
            raise _RowError(Reason.MALFORMED_ROW, row.fault)
        try:
            name, suffix = self._image(row, images)
            identity, key = self._key(row, name)
            if config.split is not None:
                split = _split(cell(row.values, config.split), config.split)
            texts = config.texts.texts(row.values, identity).to_json().decode()
        except (ValueError, TypeError, ShardError) as error:
            raise _RowError(Reason.MALFORMED_ROW, str(error)) from error
        except RecursionError as error:
            raise _RowError(Reason.MALFORMED_ROW, "its values are nested too deeply") from error
        split = split or hash_split(key, config.validation_fraction)
        if row.image_bytes:
            image = {"cell": f"{_CELL}{row.image_bytes}", "stamp": stamp, "suffix": suffix}
        else:
            image = {"name": name, "images": images}
        return key, {"split": split, "image": image, "texts": texts}

    def _key(self, row: Row, name: str) -> tuple[int | str, str]:
        """Returns what a row's image is called by, and the key that this makes."""
        assert row.values is not None
        identity: int | str = image_name(name)
        if self.config.key is not None:
            identity = _identity(cell(row.values, self.config.key), self.config.key)
        elif not name:
            identity = _digest(row.image_bytes)
        return identity, image_key(identity)

    def _image(self, row: Row, images: str) -> tuple[str, str]:
        """Returns the path of a row's image, if it has one, and its suffix."""
        assert row.values is not None
        column, value = self.config.image, cell(row.values, self.config.image)
        path = value.get("path") if isinstance(value, Mapping) else value
        if row.image_bytes:
            path = path if isinstance(path, str) else ""
            suffix = SUFFIXES.get(path.rpartition(".")[2].lower(), self.config.image_suffix)
            return path, suffix
        if path is None or path == "":
            raise _RowError(Reason.NO_IMAGE, f"column {column!r} is empty")
        if not isinstance(path, str):
            raise _RowError(Reason.MALFORMED_ROW, f"{column}: expected a path: {shown(path)}")
        if not is_utf8(path) or "\0" in path:
            raise _RowError(Reason.MALFORMED_ROW, f"{column}: no file is called {shown(path)}")
        known = self._schemes(images)
        found = "data" if path.startswith("data:") else storage.scheme(path)
        if found not in known:
            hint = "download the images first"
            if found.isalnum() and found not in _NEVER:
                hint = f"`image_schemes: [{found}]` of the source allows it"
            raise _RowError(
                Reason.FORBIDDEN_LOCATION,
                f"{column}: found {shown(path)}, a {found!r} location; rows may name those of "
                f"{', '.join(known)}; {hint}",
            )
        location = storage.followed(images, path)
        if path[0] != "/" and location.startswith(f"{images}/"):
            path = location.removeprefix(f"{images}/")  # `./a.jpg` is `a.jpg`
        return path, ""

    def _schemes(self, images: str) -> tuple[str, ...]:
        """Returns the schemes that rows may name: local, their folder's own, and the recipe's."""
        return tuple(dict.fromkeys(("file", storage.scheme(images), *self.config.image_schemes)))

    def _records(
        self, key: str, entries: list[dict[str, Any]], folders: dict[str, ImageFolders]
    ) -> Iterator[Record | Reject]:
        """Yields a key's sample, and a second record for each other image its rows have."""
        by_image: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for entry in entries:
            image = entry["image"]
            part = "digest" if "cell" in image else "name"
            by_image.setdefault((part, image.get(part, "")), []).append(entry)
        num_cells = sum(part == "digest" for part, _ in by_image)
        shared = self.config.key is None and num_cells > 1
        for of_image in by_image.values():
            image, split = of_image[0]["image"], of_image[0]["split"]
            texts = gathered([Texts.from_json(entry["texts"].encode()) for entry in of_image])
            own_key = key
            if shared and "cell" in image:
                own_key = safe_key(f"{key}-{image['digest'][:_DIGEST_LENGTH]}")
                texts = _renamed(texts, own_key)
            others = sorted({entry["split"] for entry in of_image} - {split})
            yield listed(
                key=own_key,
                split=split,
                image=self._image_file(image, folders),
                texts=texts,
                detail=f"also listed for {', '.join(others)}" if others else "",
                fault=None if texts.num_texts else (Reason.NO_TEXTS, "nothing is written about it"),
                num_entries=len(of_image),
            )

    def _image_file(self, image: dict[str, str], folders: dict[str, ImageFolders]) -> ImageFile:
        if "cell" in image:
            return ImageFile(image["cell"], image["stamp"], image["suffix"])
        location = image["images"]
        if location not in folders:
            folders[location] = ImageFolders(location, schemes=self._schemes(location))
        return folders[location].called(image["name"])


def _tell_apart(found: Gathering, into: Gathering) -> Iterator[Reject]:
    """Gathers the rows again, with a digest of their bytes where several are under one key.

    In the table's order, in which its row groups are unpacked once. Yields rows without bytes.
    """
    for key, entry, repeated in found.in_order():
        image = entry["image"]
        if repeated and "cell" in image:
            try:
                image["digest"] = _digest(image["cell"].removeprefix(_CELL))
            except _RowError as fault:
                where = entry["where"]
                yield malformed(where, entry["split"], f"{where}: {fault.detail}", fault.reason)
                continue
        into.add(key, entry)


def _digest(image_bytes: str) -> str:
    try:
        return digest_of(read_cell(image_bytes))
    except SourceError as error:
        raise _RowError(Reason.NO_IMAGE, str(error)) from error


def _renamed(texts: Texts, identity: str) -> Texts:
    """Returns the texts of an image that has another id than its rows gave it."""
    questions = [
        replace(asked, question_id=f"{identity}: {asked.question}")
        if asked.question_id == f"{texts.image_id}: {asked.question}"
        else asked
        for asked in texts.questions
    ]
    return replace(texts, image_id=identity, questions=tuple(questions))


class _RowError(Exception):
    """A row cannot be used: a reject's reason and detail."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def _identity(value: Any, column: str) -> int | str:
    """Returns a key column's value; decimal digits, as CSV writes numbers, are a number."""
    if value is None or value == "":
        raise _RowError(Reason.NO_KEY, f"column {column!r} is empty")
    if type(value) is int and abs(value) <= _MAX_NUMBER:
        return value
    if not isinstance(value, str) or not is_utf8(value):
        raise _RowError(
            Reason.MALFORMED_ROW, f"{column}: expected a number or a string: {shown(value)}"
        )
    if value.isdecimal() and len(value) <= _MAX_NUMBER_DIGITS and str(int(value)) == value:
        return int(value)
    return value


def _split(value: Any, column: str) -> str:
    """Returns a split column's value, "" if it is empty; raises _RowError if it is no name."""
    if value is None or value == "":
        return ""
    if not isinstance(value, str):
        raise _RowError(Reason.MALFORMED_ROW, f"{column}: expected a split's name: {shown(value)}")
    check_names(value)
    return value


def _holds(values: Mapping[str, Any], name: str) -> bool:
    return name in values or name.partition(".")[0] in values
