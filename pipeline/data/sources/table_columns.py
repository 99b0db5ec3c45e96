"""The columnar listing of a Parquet table: whole columns of rows that are as most rows are.

What is odd about a row, be it a caption that begins as a list does, a key that is no text, or a
path with `..` in it, is left to the listing row by row, which `TableSource` has. Of the other rows
each column is made by Arrow's kernels, exactly as row by row.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.sample import safe_key
from pipeline.data.sources.columns import LISTED
from pipeline.data.sources.digests import digests, in_hex
from pipeline.data.sources.file_fingerprints import FileFingerprints
from pipeline.data.sources.image_files import SUFFIXES
from pipeline.data.sources.readers.tables import TablePart
from pipeline.data.sources.splits import hash_splits
from pipeline.data.sources.text_kernels import (
    are_safe_keys,
    caption_texts,
    json_strings,
    safe_keys,
    strings,
)
from pipeline.reason import Reason

BoolArray = npt.NDArray[np.bool_]

_KEY_DIGITS = 12  # of a number, see `image_files.image_key`
_NUMBER = "^(0|[1-9][0-9]{0,17})$"  # a text that is taken for one, see `table`
# A path that may be none, or lead elsewhere than to the file of that name below the folder.
_TO_BE_FOLLOWED = r"(^|/)\.{0,2}(/|$)|://|\x00|^data:"
_SUFFIXES = pa.array(list(SUFFIXES), pa.string())
_PARTS = pa.array(list(SUFFIXES.values()), pa.string())
_ABSENT = "no such file"
_SILENT = "nothing is written about it"


class _Images(NamedTuple):
    """The images of some rows; all are null where a row is odd."""

    location: pa.Array
    suffix: pa.Array
    name: pa.Array  # without an image's suffix


class _Identities(NamedTuple):
    """What images are called by."""

    texts: pa.Array
    is_number: pa.Array | None  # which of them are; None: none is
    is_safe: bool  # whether all can be keys as they are


@dataclass(frozen=True)
class TableColumns:
    """The columns of a table, as a recipe names them, that hold images and captions alone."""

    image: str
    captions: tuple[str, ...]
    key: str | None
    split: str | None
    image_suffix: str  # of bytes that come without a path
    validation_fraction: float | None
    _files: dict[str, FileFingerprints] = field(default_factory=dict, init=False, repr=False)

    def keys(self, part: TablePart) -> pa.Array:
        """Returns the key of each row, null where it is to be found out row by row."""
        return self._keys(self._identities(part))

    def listed(
        self, part: TablePart, images: str, stamp: str, split: str
    ) -> tuple[pa.RecordBatch, BoolArray]:
        """Returns what rows are listed as, and which of the part's rows these are: not odd ones.

        `images` is the folder that paths begin in, `stamp` the file's, `split` that of the table.
        """
        identities = self._identities(part)
        keys = self._keys(identities)
        texts = self._texts(part, _in_json(identities))
        found = self._images(part, images)
        splits = self._splits(part, split)
        is_plain = np.logical_and.reduce(
            [np.asarray(pc.is_valid(column)) for column in (keys, texts[0], found.suffix, splits)]
        )
        plain = pa.array(is_plain)
        keys, splits, payloads, num_captions, locations, suffixes = (
            column.filter(plain) for column in (keys, splits, *texts, found.location, found.suffix)
        )
        is_hashed = pc.equal(splits, "")
        if pc.any(is_hashed).as_py():
            splits = pc.if_else(is_hashed, hash_splits(keys, self.validation_fraction), splits)
        if part.bytes_column:
            stamped = pc.binary_join_element_wise(locations, stamp, " ")
            fingerprints, is_there = digests(stamped), np.ones(len(keys), bool)
        else:
            fingerprints, is_there = self._found(images, locations)
        there, speaks = pa.array(is_there), pc.greater(num_captions, 0)
        is_usual = bool(is_there.all()) and pc.all(speaks).as_py() is not False
        nothing = pa.nulls(len(keys), pa.string())
        detail = nothing if is_usual else pc.binary_join_element_wise(locations, _ABSENT, ": ")
        columns = {
            "key": keys,
            "split": splits,
            "reason": nothing
            if is_usual
            else pc.if_else(
                there, pc.if_else(speaks, None, Reason.NO_TEXTS.value), Reason.MISSING_IMAGE.value
            ),
            "detail": pa.repeat("", len(keys))
            if is_usual
            else pc.if_else(there, pc.if_else(speaks, "", _SILENT), detail),
            "image": locations if is_usual else pc.if_else(there, locations, ""),
            "suffix": suffixes if is_usual else pc.if_else(there, suffixes, ""),
            "image_fingerprint": in_hex(fingerprints),
            "texts_fingerprint": in_hex(digests(payloads)),
            "texts": payloads.cast(pa.binary()),
            "num_captions": num_captions,
            "num_questions": pa.repeat(0, len(keys)),
            "num_rounds": pa.repeat(0, len(keys)),
            "num_entries": pa.repeat(1, len(keys)),
            "tar": pa.nulls(len(keys)),
            "image_offset": pa.repeat(-1, len(keys)),
            "image_size": pa.repeat(-1, len(keys)),
        }
        ordered = [columns[name].cast(LISTED.field(name).type) for name in LISTED.names]
        return pa.record_batch(ordered, LISTED), is_plain

    def _identities(self, part: TablePart) -> _Identities:
        """Returns what images are called by; null where a row is odd."""
        if self.key is None:
            names = self._names(part)
            return _Identities(names, None, are_safe_keys(names))
        values = _column(part, self.key)
        if values is not None and pa.types.is_integer(values.type):
            values = _whole_numbers(values)
            return _Identities(values, pc.is_valid(values), True)
        texts = None if values is None else strings(values)
        if texts is None:
            return _Identities(pa.nulls(part.num_rows, pa.string()), None, True)
        texts = pc.if_else(pc.equal(texts, ""), None, texts)
        is_number = pc.match_substring_regex(texts, _NUMBER)
        has_numbers = pc.any(is_number).as_py()
        return _Identities(texts, is_number if has_numbers else None, are_safe_keys(texts))

    def _keys(self, identities: _Identities) -> pa.Array:
        texts, is_number, is_safe = identities
        keys = texts if is_safe else _safe_keys(texts)
        if is_number is None:
            return keys
        return pc.if_else(is_number, pc.utf8_lpad(texts, _KEY_DIGITS, "0"), keys)

    def _texts(self, part: TablePart, image_ids: pa.Array) -> tuple[pa.Array, pa.Array]:
        columns = [_column(part, name) for name in self.captions]
        found = None
        if all(column is not None for column in columns):
            found = caption_texts(image_ids, columns)
        return found or (pa.nulls(part.num_rows, pa.string()), pa.nulls(part.num_rows, pa.int64()))

    def _splits(self, part: TablePart, split: str) -> pa.Array:
        """Returns each row's split, "" where its key decides, null where the row is odd."""
        if self.split is None:
            return pa.repeat(pa.scalar(split), part.num_rows)
        values = _column(part, self.split)
        texts = None if values is None else strings(values)
        if texts is None:
            return pa.nulls(part.num_rows, pa.string())
        distinct = pc.fill_null(texts, "").dictionary_encode()
        names = [
            name if safe_key(name) == name or not name else None
            for name in distinct.dictionary.to_pylist()
        ]
        return pa.array(names, pa.string()).take(distinct.indices)

    def _names(self, part: TablePart) -> pa.Array:
        """Returns the names of images without their suffix, null where a row is odd."""
        return self._images(part, "").name

    def _images(self, part: TablePart, images: str) -> _Images:
        """Returns the images of rows; nothing is looked up."""
        paths = self._image_paths(part)
        if paths is None:
            nothing = pa.nulls(part.num_rows, pa.string())
            return _Images(nothing, nothing, nothing)
        endings = pc.ascii_lower(pc.replace_substring_regex(paths, r"(?s)^.*\.", ""))
        suffixes = _PARTS.take(pc.index_in(endings, _SUFFIXES))
        names = pc.replace_substring_regex(paths, r"\.[^.]*$", "")
        if part.bytes_column:
            numbers = np.arange(part.first_in_group, part.first_in_group + part.num_rows)
            rows = pa.array(numbers).cast(pa.string())
            cells = pc.binary_join_element_wise(
                f"cell:{part.cells_before}", rows, part.cells_after, ""
            )
            suffixes = pc.fill_null(suffixes, self.image_suffix)
            suffixes = pc.if_else(pc.string_is_ascii(endings), suffixes, None)
            if self.key is not None:
                return _Images(cells, suffixes, names)
            suffixes = pc.if_else(pc.equal(paths, ""), None, suffixes)
            # An ending that is none of ours belongs to the name.
            is_ours = pc.is_in(endings, _SUFFIXES)
            return _Images(cells, suffixes, pc.if_else(is_ours, names, None))
        odd = pc.or_(
            pc.fill_null(pc.match_substring_regex(paths, _TO_BE_FOLLOWED), True),
            pc.invert(pc.match_substring(paths, ".")),
        )
        suffixes = pc.if_else(odd, None, suffixes)
        locations = pc.binary_join_element_wise(images.rstrip("/"), paths, "/")
        return _Images(locations, suffixes, pc.if_else(pc.is_valid(suffixes), names, None))

    def _image_paths(self, part: TablePart) -> pa.Array | None:
        """Returns the paths of a part's images, "" where there is none beside its bytes."""
        column = _column(part, self.image)
        if column is not None and pa.types.is_struct(column.type):
            column = _below(column, "path")
        if column is None:
            no_path = bool(part.bytes_column) and self.key is not None
            return pa.repeat(pa.scalar(""), part.num_rows) if no_path else None
        paths = strings(column)
        return pc.fill_null(paths, "") if paths is not None and part.bytes_column else paths

    def _found(self, images: str, locations: pa.Array) -> tuple[npt.NDArray[np.uint64], BoolArray]:
        folder = images.rstrip("/")
        if not len(locations):
            return np.empty(0, np.uint64), np.empty(0, bool)
        if folder not in self._files:
            self._files[folder] = FileFingerprints(folder)
        found, is_there = self._files[folder].find(locations)
        if not is_there.all():
            absent = pa.array(~is_there)
            named = pc.binary_join_element_wise(locations.filter(absent), "None", " ")
            found[~is_there] = digests(named)
        return found, is_there


def _in_json(identities: _Identities) -> pa.Array:
    texts, is_number, is_safe = identities
    quoted = pc.binary_join_element_wise('"', texts, '"', "") if is_safe else json_strings(texts)
    return quoted if is_number is None else pc.if_else(is_number, texts, quoted)


def _column(part: TablePart, path: str) -> pa.Array | None:
    """Returns what rows hold at a dotted path, as `text_columns.cell` finds it, or None."""
    if part.columns is None:
        return None
    names = part.columns.schema.names
    if path in names:
        return part.columns.column(path)
    name, dot, rest = path.partition(".")
    return _below(part.columns.column(name), rest) if dot and name in names else None


def _below(column: pa.Array, path: str) -> pa.Array | None:
    if not pa.types.is_struct(column.type):
        return None
    if column.type.get_field_index(path) >= 0:
        return pc.struct_field(column, path)
    name, dot, rest = path.partition(".")
    is_there = bool(dot) and column.type.get_field_index(name) >= 0
    return _below(pc.struct_field(column, name), rest) if is_there else None


def _whole_numbers(values: pa.Array) -> pa.Array:
    """Returns numbers as texts, null where they are negative or beyond 63 bits."""
    if pa.types.is_uint64(values.type):
        values = pc.if_else(pc.less(values, pa.scalar(1 << 63, pa.uint64())), values, None)
    values = values.cast(pa.int64())
    return pc.if_else(pc.greater_equal(values, 0), values, None).cast(pa.string())


def _safe_keys(texts: pa.Array) -> pa.Array:
    if not texts.null_count:
        return safe_keys(texts)
    return pc.if_else(pc.is_valid(texts), safe_keys(pc.fill_null(texts, "")), None)
