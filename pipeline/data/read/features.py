"""The reader of stored features: padded batches, read by position from an extractor's sidecars."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.lib.format as npy
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.read.buffers import BufferPool
from pipeline.data.read.extractor_card import card_location, read_card
from pipeline.data.read.sidecar_layout import BLOCK_BYTES, card_layout
from pipeline.data.tars.members import Int64Array, Members, sorted_codes
from pipeline.data.tars.shard import sidecar_location
from pipeline.data.tars.shard_files import ShardFiles
from pipeline.errors import FeatureError

MAX_HEADER_BYTES = 4096  # ours have 128

# Fields of FeatureBatch that only some extractors fill.
_PARTS = ("classes", "attributes", "labels", "scores", "times")

_COLUMNS = (
    "key",
    "shard",
    "values_offset",
    "values_size",
    "boxes_offset",
    "boxes_size",
    "num_regions",
    "reason",
)


@dataclass(frozen=True)
class FeatureBatch:
    """Features of B samples with at most R regions of D values.

    What lies beyond a sample's `num_regions` is padding, and zero. Where a network in the model
    makes the values, D is 0 and the `pixels` are given that it makes them of. Classes and
    attributes are what a detector took a region for: a probability for each of its C classes, the
    first being background, and A attributes.
    """

    values: npt.NDArray[Any]  # (B, R, D) uint8, float16 or float32; stored int8 comes as float32
    boxes: npt.NDArray[np.float32]  # (B, R, 4) x1, y1, x2, y2, fractions of width and height
    num_regions: npt.NDArray[np.int32]  # (B,)
    classes: npt.NDArray[Any] | None = None  # (B, R, C), if the extractor gives them
    attributes: npt.NDArray[Any] | None = None  # (B, R, A), if the extractor gives them
    labels: npt.NDArray[np.int32] | None = None  # (B, R) a class each, if the extractor gives them
    scores: npt.NDArray[np.float32] | None = None  # (B, R) the labels', from 0 to 1
    times: npt.NDArray[np.float32] | None = None  # (B, R) seconds into the video, of its frame
    pixels: npt.NDArray[np.uint8] | None = None  # (B, S, S, 3) red, green, blue


class FeatureReader:
    """Reads the features of any rows of a split, padded to the most regions among them."""

    def __init__(
        self,
        values: "ArrayReader",
        boxes: "ArrayReader | npt.NDArray[np.float32]",
        num_regions: npt.NDArray[np.int32],
        parts: "Mapping[str, ArrayReader]",
        masks: "MaskReader | None",
    ) -> None:
        self._values = values
        self._boxes = boxes  # (R, 4) where all images have the same
        self._num_regions = num_regions
        self._scales = parts.get("scales")  # of int8 values: (B, R, 1) or (B, 1, D)
        self._more = {name: parts[name] for name in _PARTS if name in parts}
        self._masks = masks
        self._pool = BufferPool()

    def read(self, rows: Int64Array) -> FeatureBatch:
        """Raises ShardError or FeatureError, naming file and sample, if they cannot be read."""
        values = self._values.read(rows)
        if self._scales is not None:
            # float32: numpy multiplies into it in 40 µs a sample of 36 x 2048, into float16 in
            # 600, and on a CPU the model would turn float16 into float32 again
            restored = self._pool.empty(values.shape, np.float32)
            values = np.multiply(values, self._scales.read(rows), out=restored)
        if isinstance(self._boxes, ArrayReader):
            boxes = self._boxes.read(rows)
        else:
            boxes = np.tile(self._boxes, (len(rows), 1, 1))
        more = {name: reader.read(rows) for name, reader in self._more.items()}
        return FeatureBatch(values, boxes, self._num_regions[rows], **more)

    def fetch(self, rows: Int64Array) -> None:
        """Brings the sidecars of these rows, where they are far away, into the cache."""
        self._values.fetch(rows)

    def masks(self, row: int) -> list[dict[str, Any]] | None:
        """Returns the outlines of a row's regions, if it has some: COCO's run-length code."""
        return None if self._masks is None else self._masks.read(row)


class ArrayReader:
    """Reads `.npy` payloads, whose first axis is regions, into one zero-padded array.

    The headers of one extractor differ only in the number of regions, so that each is parsed
    when it is first met and compared with the parsed one from then on. `axes` names what every
    array has, (R, D) for example.
    """

    def __init__(
        self, members: Members, num_regions: npt.NDArray[np.int32], axes: str = "(R, D)"
    ) -> None:
        self._members = members
        self._num_regions = num_regions
        self._pool = BufferPool()
        self._headers: dict[int, bytes] = {}  # that were parsed, by number of regions
        first = storage.read_range(
            members.location(0), members.offset(0), min(int(members.sizes[0]), MAX_HEADER_BYTES)
        )
        shape, self.dtype, _ = self._parse(0, first)
        if len(shape) != len(axes.strip("()").rstrip(",").split(",")):
            raise FeatureError(f"{self._where(0)}: expected an array {axes}, found shape {shape}")
        self._region = shape[1:]  # of what is kept of one region
        region_size_bytes = int(np.prod(self._region)) * self.dtype.itemsize
        self._data_sizes = num_regions.astype(np.int64) * region_size_bytes
        self._header_sizes = members.sizes - self._data_sizes
        odd = (self._header_sizes < npy.MAGIC_LEN) | (self._header_sizes > MAX_HEADER_BYTES)
        if odd.any():
            row = int(np.argmax(odd))
            raise FeatureError(
                f"{self._where(row)}: the manifest gives {members.sizes[row]} bytes to "
                f"{num_regions[row]} regions of {self._region} {self.dtype} values, which need "
                f"{self._data_sizes[row]} and a header; were extractors mixed in one folder?"
            )

    def fetch(self, rows: Int64Array) -> None:
        """Brings the sidecars of these rows, where they are far away, into the cache."""
        self._members.fetch(rows)

    def read(self, rows: Int64Array) -> npt.NDArray[Any]:
        """Returns (B, R, D), or whatever else follows R, the most regions among the rows."""
        num_regions = self._num_regions[rows]
        shape = (len(rows), int(num_regions.max(initial=0)), *self._region)
        array = self._pool.empty(shape, self.dtype)
        header_sizes = self._header_sizes[rows].tolist()
        headers = bytearray(sum(header_sizes))
        ends = [*accumulate(header_sizes)]
        header_view, data_view = memoryview(headers), _bytes_of(array)
        data_stride = array[:1].nbytes
        self._members.read_into(
            rows,
            [
                [
                    header_view[end - header_size : end],
                    data_view[i * data_stride : i * data_stride + data_size],
                ]
                for i, (end, header_size, data_size) in enumerate(
                    zip(ends, header_sizes, self._data_sizes[rows].tolist(), strict=True)
                )
            ],
        )
        # One comparison of bytes, which keeps the interpreter: numpy's would let another thread
        # have it, and wait for it, at each of several steps.
        known = [self._headers.get(count, b"") for count in num_regions.tolist()]
        if [*map(len, known)] != header_sizes or b"".join(known) != headers:
            for row, end, header_size in zip(rows.tolist(), ends, header_sizes, strict=True):
                self._check_header(row, bytes(headers[end - header_size : end]))
        for i in np.flatnonzero(num_regions < shape[1]).tolist():
            array[i, num_regions[i] :] = 0
        return array

    def _check_header(self, row: int, header: bytes) -> None:
        expected = (int(self._num_regions[row]), *self._region)
        if self._headers.get(expected[0]) == header:
            return
        shape, dtype, size = self._parse(row, header)
        if (shape, dtype, size) != (expected, self.dtype, len(header)):
            raise FeatureError(
                f"{self._where(row)}: expected an array {expected} of {self.dtype}, found "
                f"{shape} of {dtype}; the sidecar is not the one that the manifest lists"
            )
        self._headers[expected[0]] = header

    def _parse(self, row: int, header: bytes) -> tuple[tuple[int, ...], np.dtype[Any], int]:
        stream = BytesIO(header)
        try:
            version = npy.read_magic(stream)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran_order, dtype = read(stream)
        except ValueError as error:
            raise FeatureError(f"{self._where(row)}: not a .npy payload ({error})") from error
        if fortran_order or dtype.hasobject:
            raise FeatureError(
                f"{self._where(row)}: expected plain values in C order, found {dtype} in "
                f"{'Fortran' if fortran_order else 'C'} order"
            )
        return shape, dtype, stream.tell()

    def _where(self, row: int) -> str:
        return f"{self._members.location(row)}: sample {self._members.keys[row]!r}"


class MaskReader:
    """Reads the outlines of one sample's regions."""

    def __init__(self, members: Members) -> None:
        self._members = members  # as if each had no bytes: the size of one stands in its tar

    def read(self, row: int) -> list[dict[str, Any]]:
        """Returns a COCO run-length code, `size` and `counts`, for each region of the row."""
        location, offset = self._members.location(row), self._members.offset(row)
        header = storage.read_range(location, offset - BLOCK_BYTES, BLOCK_BYTES)
        name = f"{self._members.keys[row]}.segments.json".encode()
        if header[: len(name)] != name:
            raise FeatureError(
                f"{location}: sample {self._members.keys[row]!r}: no masks at byte {offset}, where "
                "the card has them; the sidecar is not the one that the manifest lists"
            )
        size_bytes = int(header[124:135], 8)
        masks: list[dict[str, Any]] = json.loads(storage.read_range(location, offset, size_bytes))
        return masks


def listed_features(manifest: Manifest, extractor: str, split: str, samples: pa.Table) -> pa.Table:
    """Returns what is listed of an extractor's features of these samples, row for row.

    A row with a `reason` is of an image that the extractor could make nothing of. Raises
    FeatureError if nothing is listed of some of the samples, or no feature of any.
    """
    listed = manifest.features(extractor).rows(_COLUMNS)
    row = pc.index_in(listed["key"], value_set=samples["key"].combine_chunks())
    # Features made of an image that was edited since lie in another shard: they do not count.
    shard = samples["shard"].take(row).cast(pa.string())
    current = pc.fill_null(pc.equal(listed["shard"], shard), False)
    listed, row = listed.filter(current), row.filter(current).to_numpy()
    place = np.full(samples.num_rows, -1)
    place[row] = np.arange(len(row))
    if (place < 0).any():
        first = samples["key"][int(np.argmin(place))].as_py()
        raise FeatureError(
            f"{manifest.url}: {np.count_nonzero(place < 0)} of the {len(place)} live samples of "
            f"split {split!r} have no features of {extractor!r}, {first!r} the first of them; run "
            "`sightline extract RECIPE`"
        )
    listed = listed.take(place)
    if not listed["reason"].null_count:
        raise FeatureError(
            f"{manifest.url}: {extractor!r} could make nothing of any of the {len(place)} images "
            f"of split {split!r}; `sightline data rejects` lists them with the reasons"
        )
    return listed


def open_features(
    manifest: Manifest,
    extractor: str,
    listed: pa.Table,
    keys: npt.NDArray[Any],
    files: ShardFiles,
) -> FeatureReader:
    """Returns a reader of an extractor's features, row for row of what is listed of them.

    Raises FeatureError if they disagree with the card.
    """
    names, location_of_row = sorted_codes(listed["shard"])
    locations = [sidecar_location(manifest.url, extractor, name) for name in names]
    num_regions = listed["num_regions"].to_numpy()

    def members(offsets: Int64Array, sizes: Int64Array) -> Members:
        return Members(files, locations, location_of_row, offsets, sizes, keys)

    def listed_members(part: str) -> Members:
        return members(*(listed[f"{part}_{name}"].to_numpy() for name in ("offset", "size")))

    values = ArrayReader(listed_members("values"), num_regions)
    implied = listed["boxes_offset"].to_numpy() < 0
    layout = card_layout(manifest.url, extractor)
    if values.dtype == np.int8 and "scales" not in layout.arrays:
        raise FeatureError(
            f"{manifest.url}: features of {extractor!r} are int8 without scales on their card; "
            "run `sightline extract RECIPE`"
        )
    places = layout.places(
        listed["values_offset"].to_numpy(),
        listed["values_size"].to_numpy(),
        num_regions,
        with_boxes=not implied.any(),
    )
    parts = {
        name: ArrayReader(
            members(*places[name]),
            layout.arrays[name].counts(num_regions),
            layout.arrays[name].axes,
        )
        for name in (*_PARTS, "scales")
        if name in layout.arrays
    }
    masks = None
    if layout.segments:
        masks = MaskReader(members(*places["segments"]))
    if not implied.any():
        boxes = ArrayReader(listed_members("boxes"), num_regions)
        return FeatureReader(values, boxes, num_regions, parts, masks)
    cells = card_boxes(manifest.url, extractor)
    odd = ~implied | (num_regions != len(cells))
    if odd.any():
        first = int(np.argmax(odd))
        raise FeatureError(
            f"{manifest.url}: features of {extractor!r}: the card's grid has {len(cells)} cells "
            f"and implies the boxes; sample {keys[first]!r} has {num_regions[first]} regions"
            + ("" if implied[first] else " with boxes of its own")
        )
    return FeatureReader(values, cells, num_regions, parts, masks)


def merged(parts: Sequence[tuple[Int64Array, FeatureBatch]], pool: BufferPool) -> FeatureBatch:
    """Puts batches together, each sample at its place, padded to the most regions among them.

    Raises FeatureError if they do not hold the same kinds of arrays.
    """
    if len(parts) == 1:
        return parts[0][1]
    count = sum(len(places) for places, _ in parts)
    num_regions = max(batch.values.shape[1] for _, batch in parts)

    def put(name: str, padded_axes: int = 2) -> npt.NDArray[Any] | None:
        arrays = [getattr(batch, name) for _, batch in parts]
        kinds = {
            None if array is None else (array.shape[padded_axes:], array.dtype) for array in arrays
        }
        if len(kinds) > 1:
            raise FeatureError(
                f"splits that are mixed have features with different {name}: found "
                f"{', '.join(map(str, kinds))}; extract all of them by the same extractor"
            )
        if arrays[0] is None:
            return None
        padded = (count, num_regions)[:padded_axes]
        array = pool.empty((*padded, *arrays[0].shape[padded_axes:]), arrays[0].dtype)
        for (places, _), part in zip(parts, arrays, strict=True):
            if padded_axes == 1:
                array[places] = part
            else:
                array[places, : part.shape[1]] = part
                array[places, part.shape[1] :] = 0
        return array

    values, boxes = put("values"), put("boxes")
    assert values is not None
    assert boxes is not None
    regions = np.empty(count, np.int32)
    for places, batch in parts:
        regions[places] = batch.num_regions
    more = {name: put(name) for name in _PARTS}
    return FeatureBatch(values, boxes, regions, **more, pixels=put("pixels", padded_axes=1))


def grid_boxes(height: int, width: int) -> npt.NDArray[np.float32]:
    """Returns the cells of a grid, row by row: (height * width, 4) x1, y1, x2, y2 fractions."""
    rows, columns = np.divmod(np.arange(height * width), width)
    edges = (columns / width, rows / height, (columns + 1) / width, (rows + 1) / height)
    return np.stack(edges, axis=1).astype(np.float32)


def card_boxes(url: str, extractor: str) -> npt.NDArray[np.float32]:
    """Returns the boxes (R, 4) that a grid extractor's card implies, or raises FeatureError."""
    card = read_card(url, extractor)
    if card is None or card.grid is None:
        raise FeatureError(
            f"{card_location(url, extractor)}: expected a card whose `grid` [height, width] gives "
            f"the boxes, found {'none' if card is None else 'null'}; run `sightline extract RECIPE`"
        )
    return grid_boxes(*card.grid)


def _bytes_of(array: npt.NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
