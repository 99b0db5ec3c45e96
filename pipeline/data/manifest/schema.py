"""The row of a manifest, as a struct and as columns of Arrow.

`SampleRow` says what is known of a sample, `FeatureRow` what of its features by one extractor. The
columns follow from the fields, and `to_table` and `from_table` are the only way between the two.

What a row lacks is its field's default, in Arrow null: a reject has no shard, a live sample no
reason. Fields without a default are in every row.
"""

from collections.abc import Iterator, Sequence
from enum import StrEnum
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.tars.foreign_tar import ForeignTar
from pipeline.errors import ManifestError
from pipeline.reason import Reason

Int64Array = npt.NDArray[np.int64]

Int32 = Annotated[int, pa.int32()]
_TYPES = {str: pa.string(), bytes: pa.binary(), int: pa.int64()}
_ROWS_AT_ONCE = 4096  # that are Python objects at a time

Row = TypeVar("Row", bound=msgspec.Struct)


class State(StrEnum):
    """What has become of a record."""

    LIVE = "live"  # it is a sample
    REJECT = "reject"  # it cannot be one, or shall not
    REMOVED = "removed"  # its source has it no more


class SampleRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A record of a dataset's source, and where the sample lies that it has become.

    A reject that was listed as one has no suffix: its image was never looked at.
    """

    key: str
    split: str
    state: State
    reason: Reason | None = None  # of a reject
    detail: str = ""  # of a reject: the fault; of a live sample: what was left out
    image_fingerprint: str  # the source's, when the record was last read
    texts_fingerprint: str
    digest: str = ""  # xxh3_128 of the image's bytes, in hex
    shard: str = ""  # the name of the tar that holds the image, without .tar
    # Of an image that was left in somebody else's tar: that one. The shard refers to it, and
    # offset and size are those in the foreign tar.
    tar: ForeignTar | None = None
    suffix: str = ""  # of the image part
    image_offset: int = -1
    image_size: int = -1
    texts_shard: str = ""  # the name of the tar that holds the texts
    texts_offset: int = -1
    texts_size: int = -1
    num_captions: Int32 = -1
    num_questions: Int32 = -1
    num_rounds: Int32 = -1
    width: Int32 = -1  # pixels
    height: Int32 = -1
    source_digest: str = ""  # as `digest`, of the file the image was encoded anew from
    perceptual_hash: int | None = None  # of near duplicates' filter: 64 bits, as a signed number
    duplicate_of: str = ""  # of a reject for that reason: the key of the live sample
    sequence: int = -1  # the version whose commit wrote the row


class FeaturePart(msgspec.Struct, frozen=True):
    """An array that a sidecar has of a sample, header included: its name, and where it lies."""

    name: str  # `values`, `boxes`, `scales`, `classes`, …; `segments` are outlines, in JSON
    offset: int
    size: int


class FeatureRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an extractor has made of a sample's image, or why it could make nothing."""

    key: str
    shard: str  # of the image, and so of the sidecar; without .tar
    num_regions: Int32 = -1
    parts: tuple[FeaturePart, ...] = ()
    reason: Reason | None = None  # of an image that the extractor could make nothing of
    detail: str = ""
    sequence: int = -1


def part_suffix(name: str) -> str:
    """Returns the suffix that a part's member has in the sidecar."""
    return {"values": "npy", "segments": "segments.json"}.get(name, f"{name}.npy")


def arrow_schema(struct: type[msgspec.Struct]) -> pa.Schema:
    """Returns a column for each field of a struct, in their order."""
    hints = get_type_hints(struct, include_extras=True)
    return pa.schema([(name, _arrow_type(hints[name])) for name in struct.__struct_fields__])


def _arrow_type(hint: Any) -> pa.DataType:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return arguments[1]
    if origin in (Union, UnionType):
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _arrow_type(hint)
    if origin is tuple:
        return pa.list_(_arrow_type(arguments[0]))
    if issubclass(hint, msgspec.Struct):
        return pa.struct(list(arrow_schema(hint)))
    return pa.string() if issubclass(hint, StrEnum) else _TYPES[hint]


SAMPLES = arrow_schema(SampleRow)
FEATURES = arrow_schema(FeatureRow)

# A live sample may lack these.
OPTIONAL_COLUMNS = frozenset(
    {"reason", "detail", "tar", "source_digest", "perceptual_hash", "duplicate_of"}
)


def to_table(rows: Sequence[Row], struct: type[Row]) -> pa.Table:
    """Returns the columns of some rows."""
    columns = msgspec.to_builtins(rows, builtin_types=(bytes,))
    return pa.Table.from_pylist(columns, arrow_schema(struct))


def from_table(table: pa.Table, struct: type[Row]) -> Iterator[Row]:
    """Yields the rows of some columns; what a table lacks stays at its default.

    Raises ManifestError of a row with a value that is none of this version of Sightline.
    """
    for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
        try:
            yield from msgspec.convert(_present(batch.to_pylist()), list[struct])  # type: ignore[valid-type]
        except msgspec.ValidationError as error:
            raise ManifestError(
                f"the manifest holds what this version of Sightline does not know ({error}); "
                "was it written by a later one?"
            ) from error


def _present(value: Any) -> Any:
    """Returns the same values without those that are null."""
    if isinstance(value, dict):
        return {name: _present(item) for name, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value


def judgements(rows: pa.Table) -> pa.ChunkedArray:
    """Returns the reason of each row that was listed as a reject, "" of every other one.

    A row says the same as a listed record or reject if split and both fingerprints are the same,
    and so is the judgement: the same files may be judged anew one day.
    """
    listed = pc.and_(pc.equal(rows["state"], State.REJECT), pc.is_null(rows["suffix"]))
    return pc.if_else(listed, pc.fill_null(rows["reason"], ""), "")


def part_places(parts: pa.ChunkedArray, name: str) -> tuple[Int64Array, Int64Array]:
    """Returns offset and size of one part of every row, -1 where a row has none."""
    column = parts.combine_chunks()
    row = pc.list_parent_indices(column).to_numpy()
    each = pc.list_flatten(column)
    named = pc.equal(pc.struct_field(each, "name"), name).to_numpy(zero_copy_only=False)
    offsets, sizes = np.full(len(column), -1), np.full(len(column), -1)
    offsets[row[named]] = pc.struct_field(each, "offset").to_numpy()[named]
    sizes[row[named]] = pc.struct_field(each, "size").to_numpy()[named]
    return offsets, sizes


def foreign_tars(column: pa.ChunkedArray) -> tuple[list[ForeignTar], Int64Array]:
    """Returns the different tars of a column, sorted, and for each row the number of its tar.

    It is -1 of a row without one.
    """
    rows = np.flatnonzero(np.asarray(pc.is_valid(column)))
    number = np.full(len(column), -1)
    if not len(rows):
        return [], number
    fields = pa.table(
        {field.name: pc.struct_field(column, field.name) for field in column.type}
    ).take(pa.array(rows))
    codes = row_codes(fields, fields.column_names)
    _, first, codes = np.unique(codes, return_index=True, return_inverse=True)
    tars = [*from_table(fields.take(pa.array(first)), ForeignTar)]
    order = sorted(range(len(tars)), key=lambda i: msgspec.structs.astuple(tars[i]))
    place = np.empty(len(tars), np.int64)
    place[order] = np.arange(len(tars))
    number[rows] = place[codes]
    return [tars[i] for i in order], number


def matching_rows(rows: pa.Table, among: pa.Table, columns: Sequence[str]) -> Int64Array:
    """Returns for each row the number of one that is alike in these columns, or -1.

    Arrow's own join takes no columns of lists or structs along.
    """
    names = list(columns)
    both = pa.concat_tables([among.select(names), rows.select(names)])
    codes = row_codes(both, names)
    place = np.full(int(codes.max(initial=-1)) + 1, -1)
    place[codes[: among.num_rows]] = np.arange(among.num_rows)
    return place[codes[among.num_rows :]]


def row_codes(rows: pa.Table, columns: Sequence[str]) -> Int64Array:
    """Returns a number for each row, the same for those alike in these columns."""
    codes = np.zeros(rows.num_rows, np.int64)
    for name in columns:
        column = pc.dictionary_encode(rows[name].combine_chunks(), null_encoding="encode")
        codes = codes * len(column.dictionary) + column.indices.to_numpy()
        if codes.max(initial=0) >= len(codes):
            codes = np.unique(codes, return_inverse=True)[1]
    return codes
