"""The rows of people's own tables: JSONL, JSON, CSV, TSV and Parquet, read one after another."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.sources.readers.delimited import (
    ANY_FORM,
    Delimited,
    TextForm,
    text_lines,
    undecoded,
)
from pipeline.data.sources.readers.json_file import read_json_list, shown, unique_names
from pipeline.errors import SourceError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_NEEDS_DELIMITER = ".txt"  # is a table only where a recipe says so

# A row's image is unpacked with its whole row group, which a worker keeps while it reads on.
MAX_IMAGE_GROUP_BYTES = 1 << 30
_GROUPS_KEPT = 2
_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Row:
    """A row as plain values, or what is wrong with it. `place` says which it is in its file."""

    place: str  # `line 7`, or `row 7`, from 1
    values: dict[str, Any] | None
    fault: str = ""
    image_bytes: str = ""  # where the bytes of its image are, in the form `read_cell` takes


def table_files(location: str, form: TextForm = ANY_FORM) -> list[str]:
    """Returns a table's files: itself, or those of a folder by name; raises SourceError if none."""
    if _format(location, form):
        return [location]
    names = [name for name in storage.list_names(location) if _format(name, form)]
    if not names:
        hint = ""
        if location.lower().removesuffix(".gz").endswith(_NEEDS_DELIMITER):
            hint = f"; a {_NEEDS_DELIMITER} is one once the recipe says its `delimiter`"
        raise SourceError(
            f"{location}: expected a table or a folder of tables, ending in "
            f"{', '.join(SUFFIXES)} (or .gz after it, but for .parquet){hint}"
        )
    return [storage.join(location, name) for name in names]


def rows(
    location: str, columns: Sequence[str], image: str, form: TextForm = ANY_FORM
) -> Iterator[Row]:
    """Yields the rows of one file; of Parquet, only these columns and never an image's bytes.

    `image` is the path of the column that may hold bytes. Raises SourceError naming the file if it
    is not in its format as a whole, or lacks one of the columns; a single bad row is yielded.
    """
    kind = _format(location, form)
    if kind == ".parquet":
        yield from _parquet_rows(location, columns, image)
    elif kind == ".json":
        entries = read_json_list(location, "a table of rows; one with an object a line is a .jsonl")
        for index in range(len(entries)):
            yield _json_row(f"row {index + 1}", partial(entries.__getitem__, index))
    elif kind in (".jsonl", ".ndjson"):
        with text_lines(location, form.encoding) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _json_line(number, line, columns)
    else:
        table = Delimited(location, form, columns, image)
        for found in table.rows():
            values = None if found.fault else dict(zip(table.header, found.cells, strict=True))
            yield Row(f"line {found.number}", values, found.fault)


def count_rows(location: str, form: TextForm) -> int | None:
    """Returns how many rows a file has without reading one: Parquet's own number, JSONL's lines.

    None where only reading the rows tells.
    """
    kind = _format(location, form)
    if kind == ".parquet":
        with storage.reader(location) as file:
            return int(_open_parquet(file, location).metadata.num_rows)
    if kind in (".jsonl", ".ndjson"):
        with text_lines(location, form.encoding) as lines:
            return sum(not line.isspace() for line in lines if line)
    return None


def read_cell(where: str) -> bytes:
    """Returns the image bytes that a Row spoke of; raises SourceError if the cell holds none."""
    location, _, place = where.rpartition("#")
    group, row, column = place.split(":", 2)
    try:
        cells = _image_column(location, int(group), column, storage.stamp(location))
        payload = cells[int(row)].as_py() if int(row) < len(cells) else None
    except (pa.ArrowException, LookupError) as error:
        raise SourceError(f"{where}: cannot be read: {error}") from error
    if not payload:
        raise SourceError(f"{where}: no image bytes in this row")
    return cast(bytes, payload)


def _format(location: str, form: TextForm) -> str:
    name = location.lower()
    packed = name.removesuffix(".gz")
    for suffix in SUFFIXES:
        if packed.endswith(suffix) and (suffix != ".parquet" or packed == name):
            return suffix
    return _NEEDS_DELIMITER if form.delimiter and packed.endswith(_NEEDS_DELIMITER) else ""


def _json_line(number: int, line: str, columns: Sequence[str]) -> Row:
    place = f"line {number}"
    fault = undecoded(line)
    if fault:
        return Row(place, None, fault)
    names = {json.dumps(column.partition(".")[0]) for column in columns}
    if any(line.count(name) > 1 for name in names):
        return _json_row(place, lambda: json.loads(line, object_pairs_hook=unique_names))
    return _json_row(place, lambda: json.loads(line))


def _json_row(place: str, read: Callable[[], Any]) -> Row:
    try:
        values = read()
    except RecursionError:
        return Row(place, None, "not valid JSON: nested too deeply")
    except (ValueError, SourceError) as error:
        return Row(place, None, f"not valid JSON: {error}")
    if isinstance(values, dict):
        return Row(place, values)
    return Row(place, None, f"expected an object, found {shown(values)}")


def _parquet_rows(location: str, columns: Sequence[str], image: str) -> Iterator[Row]:
    for part in parquet_parts(location, columns, image):
        yield from map(part.row, range(part.num_rows))


@dataclass(frozen=True)
class TablePart:
    """Some rows of a Parquet file as columns."""

    location: str
    group: int
    first_in_group: int
    first_in_file: int
    num_rows: int
    columns: pa.RecordBatch | None  # those that were asked for, but for image bytes; None: no other
    bytes_column: str  # "" if no row has bytes

    def row(self, index: int) -> Row:
        """Returns one of the rows."""
        place = f"row {self.first_in_file + index + 1}"
        image_bytes = ""
        if self.bytes_column:
            image_bytes = f"{self.cells_before}{self.first_in_group + index}{self.cells_after}"
        try:
            found = self.columns.slice(index, 1).to_pylist()[0] if self.columns is not None else {}
        except (pa.ArrowException, ValueError, OverflowError, IndexError) as error:
            return Row(place, None, f"a value cannot be read: {error}")
        return Row(place, found, image_bytes=image_bytes)

    @property
    def cells_before(self) -> str:
        """What stands before a row's number in its group, where its image bytes are named."""
        return f"{self.location}#{self.group}:"

    @property
    def cells_after(self) -> str:
        """What stands after it."""
        return f":{self.bytes_column}"


def parquet_parts(location: str, columns: Sequence[str], image: str) -> Iterator[TablePart]:
    """Yields the rows of a Parquet file as columns, a few thousand at a time.

    `columns`, `image` and what is raised are those of `rows`.
    """
    with storage.reader(location) as file:
        table = _open_parquet(file, location)
        with _whole(location):
            schema = table.schema_arrow
            _check_columns(location, columns, schema.names)
            bytes_column = _bytes_column(schema, image)
            if bytes_column:
                _check_group_sizes(table, bytes_column, location)
            wanted = [name for name in _leaves(table, columns) if name != bytes_column]
        first_in_file = 0
        for group in range(table.num_row_groups):
            num_rows = table.metadata.row_group(group).num_rows
            with _whole(f"{location}: row group {group}"):
                has_bytes = bytes_column and not _is_null(table, group, bytes_column)
            of_rows = bytes_column if has_bytes else ""
            first = 0
            for batch in _group_batches(table, group, wanted, location) if wanted else ():
                yield TablePart(
                    location, group, first, first_in_file, batch.num_rows, batch, of_rows
                )
                first += batch.num_rows
                first_in_file += batch.num_rows
            if not wanted:
                yield TablePart(location, group, 0, first_in_file, num_rows, None, of_rows)
                first_in_file += num_rows


def is_parquet(location: str) -> bool:
    """Whether a table's file is one that `parquet_parts` reads."""
    return _format(location, ANY_FORM) == ".parquet"


def _check_columns(location: str, columns: Sequence[str], names: Sequence[str]) -> None:
    for column in columns:
        name = column if column in names else column.partition(".")[0]
        if name not in names:
            raise SourceError(
                f"{location}: no column {column!r}; there are {', '.join(map(repr, names))}"
            )
        if names.count(name) > 1:
            raise SourceError(f"{location}: {names.count(name)} columns are called {name!r}")


def _open_parquet(file: BinaryIO, location: str) -> Any:
    with _whole(location):
        return pq.ParquetFile(file)


def _read_group(table: Any, group: int, columns: Sequence[str], location: str) -> pa.Table:
    with _whole(f"{location}: row group {group}"):
        return table.read_row_group(group, columns=columns)


def _group_batches(
    table: Any, group: int, columns: Sequence[str], location: str
) -> Iterator[pa.RecordBatch]:
    with _whole(f"{location}: row group {group}"):
        batches = table.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns)
    while True:
        with _whole(f"{location}: row group {group}"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@contextmanager
def _whole(where: str) -> Iterator[None]:
    """Makes what pyarrow raises of a damaged file a SourceError."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        raise SourceError(
            f"{where}: not whole, or not Parquet: {error}; it was damaged or cut short on its way, "
            "or is of a kind that this pyarrow does not know"
        ) from error


def _bytes_column(schema: Any, image: str) -> str:
    """Returns the leaf that holds image bytes, `image` or `image.bytes`, or nothing."""
    name, _, rest = (image, "", "") if image in schema.names else image.partition(".")
    kind = schema.field(name).type
    for part in filter(None, rest.split(".")):
        if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return ""
        kind = kind.field(part).type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return image
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return _bytes_column(schema, f"{image}.bytes")
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
    found = [chunk for chunk in chunks if chunk.path_in_schema == column]
    if not found:
        raise LookupError(f"row group {group} has no column {column!r}")
    return found[0]


@lru_cache(maxsize=_GROUPS_KEPT)
def _image_column(location: str, group: int, column: str, _stamp: str) -> Any:
    """Returns the cells of one row group; the stamp keeps a rewritten file from looking old."""
    with storage.reader(location) as file:
        table = _open_parquet(file, location)
        if group >= table.num_row_groups:
            raise SourceError(f"{location}: row group {group} vanished since it was listed")
        parts = [] if column in table.schema_arrow.names else column.split(".")[1:]
        cells = _read_group(table, group, [column], location).column(0)
        for part in parts:
            cells = pa.chunked_array([chunk.field(part) for chunk in cells.chunks], type=None)
        return cells
