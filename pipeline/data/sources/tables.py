"""The rows of people's own tables: JSONL, JSON, CSV, TSV and Parquet, read one after another."""

import csv
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.sources.json_file import read_json_list
from pipeline.errors import SourceError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")

# A row's image is unpacked with its whole row group, which a worker keeps while it reads on.
MAX_IMAGE_GROUP_BYTES = 1 << 30
_GROUPS_KEPT = 2

_MAX_CELL = 1 << 24  # characters; Python's own limit of 128 Ki is less than some dialogs


@dataclass(frozen=True)
class Row:
    """A row as plain values, or what is wrong with it. `number` counts from 1 in its file."""

    number: int
    values: dict[str, Any] | None
    fault: str = ""
    image_bytes: str = ""  # where the bytes of its image are, in the form `read_cell` takes


def table_files(location: str) -> list[str]:
    """Returns a table's files: itself, or those of a folder by name; raises SourceError if none."""
    if _format(location):
        return [location]
    names = [name for name in storage.list_names(location) if _format(name)]
    if not names:
        raise SourceError(
            f"{location}: expected a table or a folder of tables, ending in "
            f"{', '.join(SUFFIXES)} (or .gz after it, but for .parquet)"
        )
    return [storage.join(location, name) for name in names]


def rows(location: str, columns: Sequence[str], image: str) -> Iterator[Row]:
    """Yields the rows of one file; of Parquet, only these columns and never an image's bytes.

    `image` is the path of the column that may hold bytes. Raises SourceError naming the file if it
    is not in its format as a whole, or lacks one of the columns; a single bad row is yielded.
    """
    form = _format(location)
    if form == ".parquet":
        yield from _parquet_rows(location, columns, image)
    elif form == ".json":
        entries = read_json_list(location, "a table of rows")
        for index in range(len(entries)):
            yield _row(index + 1, entries[index])
    elif form in (".csv", ".tsv"):
        yield from _csv_rows(location, columns, "\t" if form == ".tsv" else ",")
    else:
        with storage.reader(location) as file:
            for number, line in enumerate(_unpacked(file, location), 1):
                if line.strip():
                    yield _json_row(number, line)


def read_cell(where: str) -> bytes:
    """Returns the image bytes that a Row spoke of; raises SourceError if the cell holds none."""
    location, _, place = where.rpartition("#")
    group, row, column = place.split(":", 2)
    cells = _image_column(location, int(group), column, storage.stamp(location))
    payload = cells[int(row)].as_py() if int(row) < len(cells) else None
    if not payload:
        raise SourceError(f"{where}: no image bytes in this row")
    return cast(bytes, payload)


def _format(location: str) -> str:
    name = location.lower()
    packed = name.removesuffix(".gz")
    for suffix in SUFFIXES:
        if packed.endswith(suffix) and (suffix != ".parquet" or packed == name):
            return suffix
    return ""


def _row(number: int, values: Any) -> Row:
    if isinstance(values, dict):
        return Row(number, values)
    return Row(number, None, f"expected an object, found {repr(values)[:80]}")


def _json_row(number: int, line: bytes) -> Row:
    try:
        return _row(number, json.loads(line))
    except ValueError as error:
        return Row(number, None, f"not valid JSON: {error}")


def _csv_rows(location: str, columns: Sequence[str], delimiter: str) -> Iterator[Row]:
    with storage.reader(location) as file:
        lines = io.TextIOWrapper(_unpacked(file, location), encoding="utf-8-sig", newline="")
        csv.field_size_limit(_MAX_CELL)
        table = csv.reader(lines, delimiter=delimiter)
        try:
            header = next(table, [])
            _check_columns(location, columns, header)
            for number, cells in enumerate(table, 1):
                if not cells:
                    continue
                if len(cells) != len(header):
                    fault = f"expected {len(header)} cells, found {len(cells)}"
                    yield Row(number, None, fault)
                else:
                    yield Row(number, dict(zip(header, cells, strict=True)))
        except (csv.Error, UnicodeDecodeError) as error:
            raise SourceError(f"{location}: line {table.line_num}: {error}") from error


def _unpacked(file: BinaryIO, location: str) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file)) if location.lower().endswith(".gz") else file


def _check_columns(location: str, columns: Sequence[str], header: Sequence[str]) -> None:
    for column in columns:
        if column not in header and column.partition(".")[0] not in header:
            raise SourceError(
                f"{location}: no column {column!r}; there are {', '.join(map(repr, header))}"
            )


def _parquet_rows(location: str, columns: Sequence[str], image: str) -> Iterator[Row]:
    with storage.reader(location) as file:
        table = _open_parquet(file, location)
        schema = table.schema_arrow
        _check_columns(location, columns, schema.names)
        bytes_column = _bytes_column(schema, image)
        if bytes_column:
            _check_group_sizes(table, bytes_column, location)
        wanted = [name for name in _leaves(table, columns) if name != bytes_column]
        number = 0
        for group in range(table.num_row_groups):
            num_rows = table.metadata.row_group(group).num_rows
            has_bytes = bytes_column and not _is_null(table, group, bytes_column)
            part = table.read_row_group(group, columns=wanted) if wanted else None
            values = part.to_pylist() if part is not None else [{}] * num_rows
            for row in range(num_rows):
                number += 1
                where = f"{location}#{group}:{row}:{bytes_column}" if has_bytes else ""
                yield Row(number, values[row], image_bytes=where)


def _open_parquet(file: BinaryIO, location: str) -> Any:
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise SourceError(f"{location}: not a Parquet file: {error}") from error


def _bytes_column(schema: Any, image: str) -> str:
    """Returns the leaf that holds image bytes, `image` or `image.bytes`, or nothing."""
    name, _, rest = image.partition(".")
    kind = schema.field(name).type
    for part in filter(None, rest.split(".")):
        kind = kind.field(part).type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return image
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{image}.bytes"
    return ""


def _leaves(table: Any, columns: Sequence[str]) -> list[str]:
    """Returns the stored leaves below the columns, so that a struct can be read without one."""
    paths = [table.metadata.schema.column(i).path for i in range(table.metadata.num_columns)]
    return [
        path
        for path in paths
        if any(path == column or path.startswith(f"{column}.") for column in columns)
    ]


def _check_group_sizes(table: Any, column: str, location: str) -> None:
    for group in range(table.num_row_groups):
        size = _chunk(table, group, column).total_uncompressed_size
        if size > MAX_IMAGE_GROUP_BYTES:
            raise SourceError(
                f"{location}: row group {group} holds {size} bytes of images in {column!r}, and a "
                f"group is unpacked as a whole to read one; write the file with "
                f"row_group_size=100, as Hugging Face does"
            )


def _is_null(table: Any, group: int, column: str) -> bool:
    """Whether every cell is known to be null: Hugging Face writes paths alone so."""
    chunk = _chunk(table, group, column)
    known = chunk.statistics
    return known is not None and known.has_null_count and known.null_count == chunk.num_values


def _chunk(table: Any, group: int, column: str) -> Any:
    metadata = table.metadata.row_group(group)
    chunks = (metadata.column(index) for index in range(metadata.num_columns))
    return next(chunk for chunk in chunks if chunk.path_in_schema == column)


@lru_cache(maxsize=_GROUPS_KEPT)
def _image_column(location: str, group: int, column: str, _stamp: str) -> Any:
    """Returns the cells of one row group; the stamp keeps a rewritten file from looking old."""
    with storage.reader(location) as file:
        table = _open_parquet(file, location)
        if group >= table.num_row_groups:
            raise SourceError(f"{location}: row group {group} vanished since it was listed")
        cells = table.read_row_group(group, columns=[column]).column(0)
        for part in column.split(".")[1:]:
            cells = pa.chunked_array([chunk.field(part) for chunk in cells.chunks], type=None)
        return cells
