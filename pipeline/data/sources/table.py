"""Your own table: JSONL, JSON, CSV, TSV or Parquet, with columns mapped in the recipe.

All rows of one image make one sample. An image is a path below `images`, the bytes themselves
(Parquet), or an object with `bytes` and `path` as Hugging Face datasets write it. A key is that of
the column `key`, a whole number in twelve digits as COCO's are; without the column it is the
path without its suffix. What becomes of the rows:

- a row that cannot be read, or whose cells are not what the recipe says: `malformed-row`.
- a row without an image or a key: `no-image`, `no-key`.
- a row of a known key with another image: `duplicate-id`.
- no row of an image has a text: `no-texts`; no file: `missing-image`; another name than an
  image's: `unknown-suffix`. A cell without bytes is an `unreadable-image` once it is read.

Rows are read one after another and gathered in a scratch file, so memory does not grow with
them but by 24 bytes a row; only a `.json` list is held as a whole.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pipeline import storage
from pipeline.data.sample import Texts, safe_key
from pipeline.data.sources.base import Record, Reject, SourceConfig, by_key, fingerprint
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
from pipeline.data.sources.splits import check_names, check_splits, hash_split
from pipeline.data.sources.tables import Row, read_cell, rows, table_files
from pipeline.data.sources.text_columns import TextColumns, cell, gathered
from pipeline.errors import ShardError, SourceError

_CELL = "cell:"  # begins the locator of bytes in a table


class TableSourceConfig(SourceConfig):
    """Where the table is, and what its columns hold."""

    type: Literal["table"]
    table: str | dict[str, str]  # a file or a folder of files, or one for each split
    image: str  # the column of paths, bytes or objects with both, as a dotted path
    texts: TextColumns
    images: str | None = None  # the folder that paths begin in; null: the table's own
    key: str | None = None  # the column of keys; needed where bytes come without a path
    split: str | None = None  # the column of splits, of a single table
    image_suffix: str = "jpg"  # of bytes that come without a path
    # Of a single table without a column of splits: the share of images whose key's hash puts them
    # into `validation`; 0.1 if null.
    validation_fraction: float | None = Field(default=None, ge=0, lt=1)

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


class TableSource:
    """Images and texts of one table or one for each split."""

    def __init__(self, config: TableSourceConfig) -> None:
        self.config = config

    def records(self) -> Iterator[Record | Reject]:
        """Lists the rows that cannot be used, then the images in the order of their keys' hashes.

        Raises SourceError if a column that the recipe names is in no row.
        """
        table = self.config.table
        tables = {"": table} if isinstance(table, str) else table
        row = Row(0, None)
        with Gathering() as found:
            for split, location in tables.items():
                unseen = set(self.config.columns())
                for file in table_files(storage.absolute(location)):
                    images = storage.absolute(self.config.images or file.rpartition("/")[0])
                    stamp = storage.stamp(file)
                    for row in rows(file, self.config.columns(), self.config.image):
                        unseen -= {name for name in unseen if _holds(row.values or {}, name)}
                        try:
                            key, entry = self._entry(row, images, stamp, split)
                        except _RowError as fault:
                            yield fault.reject(file, row, split)
                        else:
                            found.add(key, entry)
                if unseen and not file.endswith(".parquet"):
                    raise SourceError(
                        f"{location}: no row has {', '.join(map(repr, sorted(unseen)))}; the last "
                        f"has {', '.join(map(repr, row.values or ()))}"
                    )
            folders: dict[str, ImageFolders] = {}
            for key, entries in found.groups():
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
            raise _RowError("malformed-row", row.fault)
        name, suffix = self._image(row)
        identity: int | str = image_name(name)
        if config.key is not None:
            identity = _identity(cell(row.values, config.key), config.key)
        elif not name:
            raise _RowError("no-key", "its image has no path; name the column `key` in the recipe")
        key = image_key(identity)
        try:
            if config.split is not None:
                split = str(cell(row.values, config.split) or "")
                check_names(split)
            texts = config.texts.texts(row.values, identity).to_json().decode()
        except (ValueError, TypeError, ShardError) as error:
            raise _RowError("malformed-row", str(error)) from error
        split = split or hash_split(key, config.validation_fraction)
        if row.image_bytes:
            image = {"cell": f"{_CELL}{row.image_bytes}", "stamp": stamp, "suffix": suffix}
        else:
            image = {"name": name, "images": images}
        return key, {"split": split, "image": image, "texts": texts}

    def _image(self, row: Row) -> tuple[str, str]:
        """Returns the path of a row's image, if it has one, and its suffix."""
        assert row.values is not None
        value = cell(row.values, self.config.image)
        path = value.get("path") if isinstance(value, Mapping) else value
        if row.image_bytes:
            path = path if isinstance(path, str) else ""
            suffix = SUFFIXES.get(path.rpartition(".")[2].lower(), self.config.image_suffix)
            return path, suffix
        if path is None or path == "":
            raise _RowError("no-image", f"column {self.config.image!r} is empty")
        if not isinstance(path, str):
            raise _RowError("malformed-row", f"{self.config.image}: expected a path: {path!r:.80}")
        if path.startswith(("http://", "https://", "data:")):
            detail = f"{self.config.image}: expected a path, found the URL {path:.80}"
            raise _RowError("malformed-row", detail)
        return path, ""

    def _records(
        self, key: str, entries: list[dict[str, Any]], folders: dict[str, ImageFolders]
    ) -> Iterator[Record | Reject]:
        """Yields a key's sample, and a second record for each other image its rows name."""
        by_image: dict[str, list[dict[str, Any]]] = {}
        for entry in entries:
            # Rows repeat their image's bytes: to compare them would be to read them.
            by_image.setdefault(entry["image"].get("name", _CELL), []).append(entry)
        for of_image in by_image.values():
            image, split = of_image[0]["image"], of_image[0]["split"]
            texts = gathered([Texts.from_json(entry["texts"].encode()) for entry in of_image])
            others = sorted({entry["split"] for entry in of_image} - {split})
            yield listed(
                key=key,
                split=split,
                image=_image_file(image, folders),
                texts=texts,
                detail=f"also listed for {', '.join(others)}" if others else "",
                fault=None if texts.num_texts else ("no-texts", "nothing is written about it"),
            )


class _RowError(Exception):
    """A row cannot be used: a reject's reason and detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def reject(self, file: str, row: Row, split: str) -> Reject:
        """Returns the row's reject, under a key that names the file and the row."""
        key = safe_key(f"{file.rpartition('/')[2]}-row-{row.number}")
        return Reject(
            key=key,
            split=split or "train",
            reason=self.reason,
            detail=f"{file}: row {row.number}: {self.detail}",
            fingerprint=fingerprint(f"{self.detail} {row.values!r}", Texts(key)),
        )


def _image_file(image: dict[str, str], folders: dict[str, ImageFolders]) -> ImageFile:
    if "cell" in image:
        return ImageFile(image["cell"], image["stamp"], image["suffix"])
    location, name = image["images"], image["name"]
    if location not in folders:
        folders[location] = ImageFolders(location)
    if storage.is_absolute(name):
        return folders[location].located(name)
    return folders[location].called(name)


def _identity(value: Any, column: str) -> int | str:
    """Returns a key column's value; decimal digits, as CSV writes numbers, are a number."""
    if value is None or value == "":
        raise _RowError("no-key", f"column {column!r} is empty")
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise _RowError("malformed-row", f"{column}: expected a number or a string: {value!r:.80}")
    if isinstance(value, str) and value.isdecimal() and str(int(value)) == value:
        return int(value)
    return value


def _holds(values: Mapping[str, Any], name: str) -> bool:
    return name in values or name.partition(".")[0] in values
