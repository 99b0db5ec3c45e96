"""The reader of stored features: padded batches, read by position from an extractor's sidecars."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from operator import sub
from typing import Any

import numpy as np
import numpy.lib.format as npy
import numpy.typing as npt

from pipeline import storage
from pipeline.data.read.buffers import BufferPool
from pipeline.data.read.extractor_card import card_location, read_card
from pipeline.data.read.rows import Located, SplitRows
from pipeline.data.tars.members import Int64Array, Members, Places
from pipeline.data.tars.shard import sidecar_location
from pipeline.data.tars.shard_files import ShardFiles
from pipeline.errors import FeatureError

MAX_HEADER_BYTES = 4096  # ours have 128

# Fields of FeatureBatch that only some extractors fill.
_PARTS = ("classes", "attributes", "labels", "scores", "times")

_NUM_AXES = {"classes": 2, "attributes": 2, "labels": 1, "scores": 1, "times": 1, "scales": 2}


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
        boxes: "ArrayReader | CardBoxes",
        parts: "Mapping[str, ArrayReader]",
        masks: "MaskReader | None",
    ) -> None:
        self._values = values
        self._boxes = boxes
        self._scales = parts.get("scales")  # of int8 values: (B, R, 1) or (B, 1, D)
        self._more = {name: parts[name] for name in _PARTS if name in parts}
        self._masks = masks
        self._pool = BufferPool()

    def read(self, located: Located) -> FeatureBatch:
        """Raises ShardError or FeatureError, naming file and sample, if they cannot be read."""
        values = self._values.read(located)
        if self._scales is not None:
            # float32: numpy multiplies into it in 40 µs a sample of 36 x 2048, into float16 in
            # 600, and on a CPU the model would turn float16 into float32 again
            restored = self._pool.empty(values.shape, np.float32)
            values = np.multiply(values, self._scales.read(located), out=restored)
        boxes = self._boxes.read(located)
        more = {name: reader.read(located) for name, reader in self._more.items()}
        return FeatureBatch(values, boxes, located.num_regions.astype(np.int32), **more)

    def fetch(self, located: Located) -> None:
        """Brings the sidecars of these rows, where they are far away, into the cache."""
        self._values.fetch(located)

    def masks(self, located: Located) -> list[dict[str, Any]] | None:
        """Returns the outlines of a row's regions, if it has some: COCO's run-length code."""
        return None if self._masks is None else self._masks.read(located)


class ArrayReader:
    """Reads `.npy` payloads, whose first axis is regions, into one zero-padded array.

    The headers of one extractor differ only in the number of regions, so that each is parsed
    when it is first met and compared with the parsed one from then on. What they have in common
    is that of the row `first`. `num_axes` is what they are expected to have.
    """

    def __init__(self, members: Members, part: str, first: Located, num_axes: int) -> None:
        self._members = members
        self._part = part
        self._pool = BufferPool()
        self._headers: dict[int, bytes] = {}  # that were parsed, by number of regions
        places = first.feature_places(part)
        where = members.where(places, 0)
        size_bytes = min(int(places.sizes[0]), MAX_HEADER_BYTES)
        header = storage.read_range(members.location(places, 0), int(places.offsets[0]), size_bytes)
        shape, self.dtype, _ = _parse(where, header)
        if len(shape) != num_axes:
            raise FeatureError(
                f"{where}: expected an array of {num_axes} axes, found shape {shape}"
            )
        # Scales of a dimension each stand for all regions.
        self._of_regions = part != "scales" or shape[1] == 1
        self._region = shape[1:]  # of what is kept of one region
        self._region_size_bytes = int(np.prod(self._region)) * self.dtype.itemsize

    def fetch(self, located: Located) -> None:
        """Brings the sidecars of these rows, where they are far away, into the cache."""
        self._members.fetch(located.feature_places(self._part))

    def read(self, located: Located) -> npt.NDArray[Any]:
        """Returns (B, R, D), or whatever else follows R, the most regions among the rows."""
        places = located.feature_places(self._part)
        counts = located.num_regions if self._of_regions else np.ones_like(located.num_regions)
        data_sizes = (counts * self._region_size_bytes).tolist()
        header_sizes = self._header_sizes(places, data_sizes)
        shape = (len(counts), int(counts.max(initial=0)), *self._region)
        array = self._pool.empty(shape, self.dtype)
        headers = bytearray(sum(header_sizes))
        ends = [*accumulate(header_sizes)]
        header_view, data_view = memoryview(headers), _bytes_of(array)
        data_stride = array[:1].nbytes
        self._members.read_into(
            places,
            [
                [
                    header_view[end - header_size : end],
                    data_view[i * data_stride : i * data_stride + data_size],
                ]
                for i, (end, header_size, data_size) in enumerate(
                    zip(ends, header_sizes, data_sizes, strict=True)
                )
            ],
        )
        # One comparison of bytes, which keeps the interpreter: numpy's would let another thread
        # have it, and wait for it, at each of several steps.
        known = [self._headers.get(count, b"") for count in counts.tolist()]
        if [*map(len, known)] != header_sizes or b"".join(known) != headers:
            for i, (end, header_size) in enumerate(zip(ends, header_sizes, strict=True)):
                where = self._members.where(places, i)
                self._check_header(where, int(counts[i]), bytes(headers[end - header_size : end]))
        for i in np.flatnonzero(counts < shape[1]).tolist():
            array[i, counts[i] :] = 0
        return array

    def _header_sizes(self, places: Places, data_sizes: list[int]) -> list[int]:
        """Returns what the payloads have besides their data."""
        sizes = [*map(sub, places.sizes.tolist(), data_sizes)]
        if (
            not (min(sizes, default=npy.MAGIC_LEN) >= npy.MAGIC_LEN)
            or max(sizes, default=0) > MAX_HEADER_BYTES
        ):
            i = next(
                i for i, size in enumerate(sizes) if not npy.MAGIC_LEN <= size <= MAX_HEADER_BYTES
            )
            raise FeatureError(
                f"{self._members.where(places, i)}: the manifest gives {places.sizes[i]} bytes to "
                f"regions of {self._region} {self.dtype} values, which need {data_sizes[i]} and a "
                "header; were extractors mixed in one folder?"
            )
        return sizes

    def _check_header(self, where: str, count: int, header: bytes) -> None:
        if self._headers.get(count) == header:
            return
        expected = (count, *self._region)
        shape, dtype, size = _parse(where, header)
        if (shape, dtype, size) != (expected, self.dtype, len(header)):
            raise FeatureError(
                f"{where}: expected an array {expected} of {self.dtype}, found "
                f"{shape} of {dtype}; the sidecar is not the one that the manifest lists"
            )
        self._headers[count] = header


class CardBoxes:
    """The boxes of a grid's cells, which its card implies for every image."""

    def __init__(self, members: Members, extractor: str, boxes: npt.NDArray[np.float32]) -> None:
        self._members = members
        self._extractor = extractor
        self._boxes = boxes  # (R, 4)

    def read(self, located: Located) -> npt.NDArray[np.float32]:
        """Returns (B, R, 4); raises FeatureError of a sample with other regions."""
        odd = located.num_regions != len(self._boxes)
        if odd.any():
            i = int(np.argmax(odd))
            raise FeatureError(
                f"{self._members.where(located.feature_places('values'), i)}: features of "
                f"{self._extractor!r}: the card's grid has {len(self._boxes)} cells and implies "
                f"the boxes; the sample has {located.num_regions[i]} regions"
            )
        return np.tile(self._boxes, (len(odd), 1, 1))


class MaskReader:
    """Reads the outlines of one sample's regions."""

    def __init__(self, members: Members) -> None:
        self._members = members

    def read(self, located: Located) -> list[dict[str, Any]] | None:
        """Returns a COCO run-length code, `size` and `counts`, for each region of the only row."""
        places = located.feature_places("segments")
        if places.offsets[0] < 0:
            return None
        (payload,) = self._members.read(places)
        try:
            masks: list[dict[str, Any]] = json.loads(payload)
        except ValueError as error:
            raise FeatureError(
                f"{self._members.where(places, 0)}: no masks at byte {places.offsets[0]}, where "
                f"the manifest has them ({error}); the sidecar is not the one that it lists"
            ) from error
        return masks


def open_features(url: str, extractor: str, rows: SplitRows, files: ShardFiles) -> FeatureReader:
    """Returns a reader of the features that the rows of a split have.

    Raises FeatureError if the first of them disagree with the card.
    """

    def sidecar(shard: int) -> str:
        return sidecar_location(url, extractor, rows.shard_name(shard))

    members = Members(files, sidecar)
    first = rows.located([0])
    values = ArrayReader(members, "values", first, num_axes=2)
    if values.dtype == np.int8 and "scales" not in rows.parts:
        raise FeatureError(
            f"{url}: features of {extractor!r} are int8 without scales; "
            "run `sightline extract RECIPE`"
        )
    parts = {
        name: ArrayReader(members, name, first, num_axes=num_axes)
        for name, num_axes in _NUM_AXES.items()
        if name in rows.parts
    }
    masks = MaskReader(members) if "segments" in rows.parts else None
    if "boxes" in rows.parts:
        boxes = ArrayReader(members, "boxes", first, num_axes=2)
        return FeatureReader(values, boxes, parts, masks)
    implied = CardBoxes(members, extractor, card_boxes(url, extractor))
    implied.read(first)
    return FeatureReader(values, implied, parts, masks)


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


def _parse(where: str, header: bytes) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Returns shape, type and length of a payload's header."""
    stream = BytesIO(header)
    try:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran_order, dtype = read(stream)
    except ValueError as error:
        raise FeatureError(f"{where}: not a .npy payload ({error})") from error
    if fortran_order or dtype.hasobject:
        raise FeatureError(
            f"{where}: expected plain values in C order, found {dtype} in "
            f"{'Fortran' if fortran_order else 'C'} order"
        )
    return shape, dtype, stream.tell()
