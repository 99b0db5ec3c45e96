"""Row numbers to padded feature batches, read by position from an extractor's sidecars."""

import json
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.lib.format as npy
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.data.buffers import BufferPool
from pipeline.data.manifest import Manifest
from pipeline.data.members import Int64Array, Members, sorted_codes
from pipeline.data.shard import sidecar_location
from pipeline.data.shard_files import ShardFiles
from pipeline.errors import FeatureError, StorageError

MAX_HEADER_BYTES = 4096  # ours have 128

_COLUMNS = (
    "key",
    "shard",
    "values_offset",
    "values_size",
    "boxes_offset",
    "boxes_size",
    "num_regions",
)


@dataclass(frozen=True)
class FeatureBatch:
    """Features of B samples with at most R regions of D values.

    What lies beyond a sample's `num_regions` is padding, and zero.
    """

    values: npt.NDArray[Any]  # (B, R, D) as stored: uint8, float16 or float32
    boxes: npt.NDArray[np.float32]  # (B, R, 4) x1, y1, x2, y2, fractions of width and height
    num_regions: npt.NDArray[np.int32]  # (B,)


class FeatureReader:
    """Reads the features of any rows of a split, padded to the most regions among them."""

    def __init__(
        self,
        values: "ArrayReader",
        boxes: "ArrayReader | npt.NDArray[np.float32]",
        num_regions: npt.NDArray[np.int32],
    ) -> None:
        self._values = values
        self._boxes = boxes  # (R, 4) where all images have the same
        self._num_regions = num_regions

    def read(self, rows: Int64Array) -> FeatureBatch:
        """Raises ShardError or FeatureError, naming file and sample, if they cannot be read."""
        values = self._values.read(rows)
        if isinstance(self._boxes, ArrayReader):
            boxes = self._boxes.read(rows)
        else:
            boxes = np.tile(self._boxes, (len(rows), 1, 1))
        return FeatureBatch(values, boxes, self._num_regions[rows])


class ArrayReader:
    """Reads `.npy` payloads of shape (num_regions, D) into one zero-padded array.

    The headers of one extractor differ only in the number of regions, so that each is parsed
    when it is first met and compared with the parsed one from then on.
    """

    def __init__(self, members: Members, num_regions: npt.NDArray[np.int32]) -> None:
        self._members = members
        self._num_regions = num_regions
        self._pool = BufferPool()
        self._headers: dict[int, bytes] = {}  # by number of regions
        first = storage.read_range(
            members.location(0), members.offset(0), min(int(members.sizes[0]), MAX_HEADER_BYTES)
        )
        shape, self._dtype, _ = self._parse(0, first)
        if len(shape) != 2:
            raise FeatureError(f"{self._where(0)}: expected an array (R, D), found shape {shape}")
        self._dim = shape[1]
        self._data_sizes = num_regions.astype(np.int64) * self._dim * self._dtype.itemsize
        self._header_sizes = members.sizes - self._data_sizes
        odd = (self._header_sizes < npy.MAGIC_LEN) | (self._header_sizes > MAX_HEADER_BYTES)
        if odd.any():
            row = int(np.argmax(odd))
            raise FeatureError(
                f"{self._where(row)}: the manifest gives {members.sizes[row]} bytes to "
                f"{num_regions[row]} regions of {self._dim} {self._dtype} values, which need "
                f"{self._data_sizes[row]} and a header; were extractors mixed in one folder?"
            )

    def read(self, rows: Int64Array) -> npt.NDArray[Any]:
        """Returns (B, R, D), R being the most regions among the rows."""
        num_regions = self._num_regions[rows]
        shape = (len(rows), int(num_regions.max(initial=0)), self._dim)
        array = self._pool.empty(shape, self._dtype)
        header_sizes = self._header_sizes[rows]
        headers = np.zeros((len(rows), int(header_sizes.max(initial=0))), np.uint8)

        header_view, data_view = _bytes_of(headers), _bytes_of(array)
        header_stride, data_stride = headers.shape[1], array[:1].nbytes
        self._members.read_into(
            rows,
            [
                [
                    header_view[i * header_stride : i * header_stride + header_size],
                    data_view[i * data_stride : i * data_stride + data_size],
                ]
                for i, (header_size, data_size) in enumerate(
                    zip(header_sizes.tolist(), self._data_sizes[rows].tolist(), strict=True)
                )
            ],
        )
        for i, count in enumerate(num_regions.tolist()):
            if headers[i, : header_sizes[i]].tobytes() != self._headers.get(count):
                self._check_header(int(rows[i]), headers[i, : header_sizes[i]].tobytes())
            if count < shape[1]:
                array[i, count:] = 0
        return array

    def _check_header(self, row: int, header: bytes) -> None:
        expected = (int(self._num_regions[row]), self._dim)
        shape, dtype, size = self._parse(row, header)
        if (shape, dtype, size) != (expected, self._dtype, len(header)):
            raise FeatureError(
                f"{self._where(row)}: expected an array {expected} of {self._dtype}, found "
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


def open_features(
    manifest: Manifest,
    extractor: str,
    split: str,
    samples: pa.Table,
    keys: npt.NDArray[Any],
    files: ShardFiles,
) -> FeatureReader:
    """Returns a reader of an extractor's features of these samples, row for row.

    Raises FeatureError if some of the samples have none, or they disagree with the card.
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
        raise FeatureError(
            f"{manifest.url}: {np.count_nonzero(place < 0)} of the {len(place)} live samples of "
            f"split {split!r} have no features of {extractor!r}, {keys[np.argmin(place)]!r} the "
            "first of them; run `sightline extract RECIPE`"
        )
    listed = listed.take(place)
    names, location_of_row = sorted_codes(listed["shard"])
    locations = [sidecar_location(manifest.url, extractor, name) for name in names]
    num_regions = listed["num_regions"].to_numpy()

    def arrays(part: str) -> ArrayReader:
        offsets, sizes = (listed[f"{part}_{name}"].to_numpy() for name in ("offset", "size"))
        members = Members(files, locations, location_of_row, offsets, sizes, keys)
        return ArrayReader(members, num_regions)

    values = arrays("values")
    implied = listed["boxes_offset"].to_numpy() < 0
    if not implied.any():
        return FeatureReader(values, arrays("boxes"), num_regions)
    boxes = _boxes_of_card(manifest.url, extractor)
    odd = ~implied | (num_regions != len(boxes))
    if odd.any():
        first = int(np.argmax(odd))
        raise FeatureError(
            f"{manifest.url}: features of {extractor!r}: the card's grid has {len(boxes)} cells "
            f"and implies the boxes; sample {keys[first]!r} has {num_regions[first]} regions"
            + ("" if implied[first] else " with boxes of its own")
        )
    return FeatureReader(values, boxes, num_regions)


def grid_boxes(height: int, width: int) -> npt.NDArray[np.float32]:
    """Returns the cells of a grid, row by row: (height * width, 4) x1, y1, x2, y2 fractions."""
    rows, columns = np.divmod(np.arange(height * width), width)
    edges = (columns / width, rows / height, (columns + 1) / width, (rows + 1) / height)
    return np.stack(edges, axis=1).astype(np.float32)


def _boxes_of_card(url: str, extractor: str) -> npt.NDArray[np.float32]:
    location = storage.join(url, "features", extractor, "card.json")
    try:
        grid = json.loads(storage.read_bytes(location))["grid"]
        height, width = grid
    except (StorageError, ValueError, KeyError, TypeError) as error:
        raise FeatureError(
            f"{location}: expected a card whose `grid` [height, width] gives the boxes "
            f"({error}); run `sightline extract RECIPE`"
        ) from error
    return grid_boxes(height, width)


def _bytes_of(array: npt.NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
