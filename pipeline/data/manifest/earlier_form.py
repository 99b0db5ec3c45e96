"""The earlier form of a manifest's tables, read as the present one.

A sample's fingerprint was one string, `image-texts`, that of a listed reject with its reason and a
colon before it; a tar of others was `stamp#listing-count#location`, and no reason was "". Of a
sidecar's arrays only values and boxes were listed: the others stand beside them in the order of
their names, and the card gives their shapes, so that their places follow.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.lib.format as npy
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.data.manifest.schema import FEATURES, SAMPLES, Int64Array, part_suffix
from pipeline.data.tars.shard import sidecar_location
from pipeline.errors import ManifestError, StorageError

_BLOCK_BYTES = 512  # of a tar: a member's header is one, and its payload ends on one
_SIZE_IN_HEADER = slice(124, 135)
_REGIONS = "R"  # stands in a card's shapes for the number of regions


@dataclass(frozen=True)
class Derived:
    """How a column follows from earlier ones."""

    earlier: tuple[str, ...]
    make: Callable[[pa.RecordBatch], pa.Array]


@dataclass(frozen=True)
class EarlierForm:
    """The columns that a table had, and how the present ones follow where they are others."""

    columns: frozenset[str]
    derived: Mapping[str, Derived]
    added: frozenset[str] = frozenset()  # those of the columns that the first tables lack

    def has(self, found: frozenset[str]) -> bool:
        """Whether these are the columns of a table of this form."""
        return self.columns - self.added <= found <= self.columns

    def columns_of(self, names: Sequence[str]) -> set[str]:
        """Returns the earlier columns that present ones follow from."""
        needed = (self.derived[n].earlier if n in self.derived else (n,) for n in names)
        return {name for group in needed for name in group}

    def converted(self, rows: pa.RecordBatch, fields: pa.Schema) -> pa.RecordBatch:
        """Returns these present columns of the rows."""
        columns = []
        for wanted in fields:
            if wanted.name in self.derived:
                column = self.derived[wanted.name].make(rows)
            elif wanted.name in rows.schema.names:
                column = rows[wanted.name]
            else:
                column = pa.nulls(rows.num_rows, wanted.type)
            columns.append(column.cast(wanted.type))
        return pa.record_batch(columns, schema=fields)


def _image_fingerprint(rows: pa.RecordBatch) -> pa.Array:
    halves = _fingerprint(rows)
    has_halves = pc.match_substring(halves, "-")
    return pc.if_else(has_halves, pc.replace_substring_regex(halves, "(?s)-.*$", ""), "")


def _texts_fingerprint(rows: pa.RecordBatch) -> pa.Array:
    return pc.replace_substring_regex(_fingerprint(rows), "^[^-]*-", "")


def _fingerprint(rows: pa.RecordBatch) -> pa.Array:
    found = rows["fingerprint"].cast(pa.string())
    judged = pc.replace_substring_regex(found, "^[a-z0-9-]+:", "")
    return pc.if_else(pc.is_null(rows["suffix"]), judged, found)


def _reason(rows: pa.RecordBatch) -> pa.Array:
    reason = rows["reason"].cast(pa.string())
    return pc.if_else(pc.equal(reason, ""), None, reason)


_TAR = r"(?s)^(?P<stamp>[^#]*)#(?P<listing>[^#-]*)(?:-(?P<num_records>[0-9]+))?#(?P<location>.*)$"


def _tar(rows: pa.RecordBatch) -> pa.Array:
    named = rows["tar"].cast(pa.string())
    parts = pc.extract_regex(named, _TAR)
    tar = SAMPLES.field("tar").type
    odd = pc.and_(pc.is_valid(named), pc.is_null(parts))
    if pc.any(odd).as_py():
        name = named.filter(odd)[0].as_py()
        raise ManifestError(f"{name!r}: expected a tar's stamp, listing, count and location")
    num_records = pc.struct_field(parts, "num_records")
    counted = pc.if_else(pc.equal(num_records, ""), "-1", num_records)
    found = {"num_records": counted}  # of a tar in a merged source the records were not counted
    fields = [
        found.get(each.name, pc.struct_field(parts, each.name)).cast(each.type) for each in tar
    ]
    return pa.StructArray.from_arrays(fields, fields=list(tar), mask=pc.is_null(named))


EARLIER_SAMPLES = EarlierForm(
    columns=frozenset(
        {
            "key", "split", "state", "reason", "detail", "fingerprint", "digest", "shard", "tar",
            "suffix", "image_offset", "image_size", "texts_shard", "texts_offset", "texts_size",
            "num_captions", "num_questions", "num_rounds", "width", "height", "source_digest",
            "perceptual_hash", "duplicate_of", "sequence",
        }
    ),
    derived={
        "image_fingerprint": Derived(("fingerprint", "suffix"), _image_fingerprint),
        "texts_fingerprint": Derived(("fingerprint", "suffix"), _texts_fingerprint),
        "reason": Derived(("reason",), _reason),
        "tar": Derived(("tar",), _tar),
    },
)  # fmt: skip

_PLACES = ("values_offset", "values_size", "boxes_offset", "boxes_size")


def earlier_features(url: str, extractor: str) -> EarlierForm:
    """Returns the form that the list of an extractor's features had."""
    parts = ("key", "shard", *_PLACES, "num_regions")
    return EarlierForm(
        columns=frozenset({*parts, "reason", "detail", "sequence"}),
        derived={"parts": Derived(parts, partial(_parts, url, extractor))},
        added=frozenset({"reason", "detail"}),
    )


def _parts(url: str, extractor: str, rows: pa.RecordBatch) -> pa.Array:
    """Returns the parts of every row, null of an image without a feature."""
    place = {name: rows[name].to_numpy() for name in (*_PLACES, "num_regions")}
    layout = _card_layout(url, extractor)
    has_boxes = place["boxes_offset"] >= 0
    places = {
        "values": (place["values_offset"], place["values_size"]),
        "boxes": (place["boxes_offset"], place["boxes_size"]),
    }
    has_values = place["values_offset"] >= 0
    if layout.arrays or layout.segments:
        with_boxes = bool(has_boxes[has_values].all())
        places = layout.places(*places["values"], place["num_regions"], with_boxes) | places
    names = list(places)
    offsets = np.stack([places[name][0] for name in names], axis=1)
    sizes = np.stack([places[name][1] for name in names], axis=1)
    there = np.repeat(has_values[:, None], len(names), axis=1)
    there[:, names.index("boxes")] &= has_boxes
    if layout.segments:
        column = names.index("segments")
        keys, shards = rows["key"].to_pylist(), rows["shard"].to_pylist()
        for row in np.flatnonzero(has_values).tolist():
            location = sidecar_location(url, extractor, shards[row])
            name = f"{keys[row]}.{part_suffix('segments')}"
            sizes[row, column] = _size_in_header(location, name, int(offsets[row, column]))
        there[:, column] &= sizes[:, column] >= 0
    part = FEATURES.field("parts").type.value_type
    each = pa.StructArray.from_arrays(
        [
            pa.array(np.tile(np.array(names, object), rows.num_rows)[there.ravel()], pa.string()),
            pa.array(offsets[there]),
            pa.array(sizes[there]),
        ],
        fields=list(part),
    )
    ends = np.concatenate([[0], np.cumsum(there.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), each, mask=pa.array(~has_values))


def _size_in_header(location: str, name: str, offset: int) -> int:
    """Returns the size of a sidecar's member, or -1 if it is not there."""
    try:
        header = storage.read_range(location, offset - _BLOCK_BYTES, _BLOCK_BYTES)
    except StorageError:
        return -1
    found = header[: len(name)] == name.encode()
    return int(header[_SIZE_IN_HEADER], 8) if found else -1


@dataclass(frozen=True)
class _PartLayout:
    """The type and shape of an array, as a card has them."""

    dtype: str
    shape: tuple[int | str, ...]

    def payload_sizes(self, num_regions: npt.NDArray[np.int32]) -> Int64Array:
        """Returns the bytes of the .npy payload for every sample."""
        counts, place = np.unique(num_regions, return_inverse=True)
        return np.array([self._payload_size(count) for count in counts.tolist()], np.int64)[place]

    def _payload_size(self, count: int) -> int:
        shape = tuple(count if length == _REGIONS else int(length) for length in self.shape)
        header = io.BytesIO()
        described = {"descr": npy.dtype_to_descr(np.dtype(self.dtype)), "shape": shape}
        npy.write_array_header_1_0(header, described | {"fortran_order": False})
        return header.tell() + int(np.prod(shape)) * np.dtype(self.dtype).itemsize


_BOXES = _PartLayout("float32", (_REGIONS, 4))


@dataclass(frozen=True)
class _Layout:
    """What a sidecar holds of each sample besides values and boxes."""

    arrays: Mapping[str, _PartLayout] = field(default_factory=dict)
    segments: bool = False  # masks, last of all: their size differs from sample to sample

    def places(
        self,
        values_offset: Int64Array,
        values_size: Int64Array,
        num_regions: npt.NDArray[np.int32],
        with_boxes: bool,
    ) -> dict[str, tuple[Int64Array, Int64Array]]:
        """Returns offset and size in bytes of every part; those of `segments` have size 0."""
        arrays = {**self.arrays, **({"boxes": _BOXES} if with_boxes else {})}
        sizes = {f"{name}.npy": part.payload_sizes(num_regions) for name, part in arrays.items()}
        if self.segments:
            sizes[part_suffix("segments")] = np.zeros_like(values_size)
        places: dict[str, tuple[Int64Array, Int64Array]] = {}
        header = values_offset - _BLOCK_BYTES
        for suffix in sorted((name for name in sizes if name < "npy"), reverse=True):
            offset = header - _padded(sizes[suffix])
            places[suffix.rpartition(".")[0]] = (offset, sizes[suffix])
            header = offset - _BLOCK_BYTES
        end = values_offset + _padded(values_size)
        for suffix in sorted(name for name in sizes if name > "npy"):
            offset = end + _BLOCK_BYTES
            places[suffix.rpartition(".")[0]] = (offset, sizes[suffix])
            end = offset + _padded(sizes[suffix])
        return places


def _card_layout(url: str, extractor: str) -> _Layout:
    """Reads the layout from an extractor's card; values and boxes alone if it names no parts."""
    location = storage.join(url, "features", extractor, "card.json")
    if not storage.exists(location):
        return _Layout()
    try:
        card: dict[str, Any] = json.loads(storage.read_bytes(location))
        arrays = {
            name: _PartLayout(part["dtype"], tuple(part["shape"]))
            for name, part in card.get("parts", {}).items()
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(
            f"{location}: expected a card whose `parts` give dtype and shape of each array "
            f"({error!r}); run `sightline extract RECIPE`"
        ) from error
    return _Layout(arrays, bool(card.get("segments", False)))


def _padded(size_bytes: Int64Array) -> Int64Array:
    return size_bytes + -size_bytes % _BLOCK_BYTES
