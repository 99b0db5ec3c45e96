"""Duplicate detection by digests and perceptual hashes, whatever order images come in.

The image that a dataset has already stays; of new ones the first in the order of the plan does,
which is that of the keys' hashes within each split. So the same records leave the same samples
whether a run was killed or not, and however its Ray tasks were timed. Two runs at the same time
do not see each other's images: each may keep one of a pair.
"""

from bisect import bisect_right
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.ingest.filters import FilterConfig
from pipeline.reason import Reason

Hashes = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]

_BITS = 64
_AT_ONCE = 64  # hashes looked up together: bounds the memory of what they might be near to


class Duplicate(NamedTuple):
    """Why an image is left out, and the key of the sample it is a copy of."""

    reason: Reason
    of: str
    detail: str


class Duplicates:
    """The images that a dataset holds, by what they are recognised by."""

    def __init__(self, holders: pa.Table, filters: FilterConfig) -> None:
        """`holders`: key, source_digest and perceptual_hash of the samples that stay."""
        holders = holders.sort_by("key")
        numbers = np.arange(holders.num_rows)
        self._keys = [holders["key"].combine_chunks()]
        self._starts = [0]  # the number of the first of each of these
        self._files = Neighbours(distance=0)
        self._files.add(_first_bits(holders["source_digest"]), numbers)
        self._looks = Neighbours(filters.near_distance) if filters.duplicates == "near" else None
        if self._looks is not None:
            hashed = np.asarray(pc.is_valid(holders["perceptual_hash"]))
            self._looks.add(_bits(holders["perceptual_hash"].drop_null()), numbers[hashed])

    def find(self, images: pa.Table) -> list[Duplicate | None]:
        """Says of each image whose copy it is; those that are none are held from now on.

        `images` has the same columns as `holders`, in the order that decides.
        """
        parts = range(0, images.num_rows, _AT_ONCE)
        return [each for start in parts for each in self._find(images.slice(start, _AT_ONCE))]

    def _find(self, images: pa.Table) -> list[Duplicate | None]:
        keys = images["key"].to_pylist()
        files = _first_bits(images["source_digest"])
        looks = _bits(images["perceptual_hash"]) if self._looks else files
        same = self._files.nearest(files).tolist()
        near = self._looks.nearest(looks).tolist() if self._looks else [-1] * len(keys)
        within = self._looks.distance if self._looks else 0
        apart = np.bitwise_count(looks[:, None] ^ looks[None, :]).tolist()

        found: list[Duplicate | None] = []
        new: list[int] = []
        for i, number in enumerate(same):
            of = self._key(number) or next((keys[j] for j in new if files[j] == files[i]), None)
            if of is not None:
                detail = f"its bytes are those of sample {of}"
                found.append(Duplicate(Reason.DUPLICATE_IMAGE, of, detail))
                continue
            of = self._key(near[i]) or next((keys[j] for j in new if apart[i][j] <= within), None)
            if of is not None:
                detail = f"it looks like sample {of}: at most {within} of {_BITS} bits differ"
                found.append(Duplicate(Reason.NEAR_DUPLICATE, of, detail))
                continue
            new.append(i)
            found.append(None)
        self._hold([keys[i] for i in new], files[new], looks[new])
        return found

    def _hold(self, keys: list[str], files: Hashes, looks: Hashes) -> None:
        start = self._starts[-1] + len(self._keys[-1])
        self._keys.append(pa.array(keys, pa.string()))
        self._starts.append(start)
        numbers = np.arange(start, start + len(keys))
        self._files.add(files, numbers)
        if self._looks is not None:
            self._looks.add(looks, numbers)

    def _key(self, number: int) -> str | None:
        if number < 0:
            return None
        part = bisect_right(self._starts, number) - 1
        key: str = self._keys[part][number - self._starts[part]].as_py()
        return key


class Neighbours:
    """Hashes of 64 bits with numbers, found by hashes that differ from them in few bits.

    Of two hashes that differ in `distance` bits, at least one of `distance` + 1 bands of bits is
    the same; so only those with a band in common are compared (multi-index hashing, Norouzi,
    Punjani and Fleet, arXiv:1307.2982). Takes 16 bytes a hash, and 16 more for each band.
    """

    def __init__(self, distance: int) -> None:
        self.distance = distance
        edges = [_BITS * band // (distance + 1) for band in range(distance + 2)]
        self._bands = [
            (np.uint64(low), np.uint64(2 ** (high - low) - 1)) for low, high in pairwise(edges)
        ]
        self._levels: list[_Level] = []  # each is at least twice as long as the next

    def add(self, hashes: Hashes, numbers: Int64Array) -> None:
        """Takes in hashes, each with a number of its own."""
        if not len(hashes):
            return
        while self._levels and len(self._levels[-1].hashes) < 2 * len(hashes):
            last = self._levels.pop()
            hashes = np.concatenate([last.hashes, hashes])
            numbers = np.concatenate([last.numbers, numbers])
        self._levels.append(_Level(hashes, numbers, self._bands))

    def nearest(self, hashes: Hashes) -> Int64Array:
        """Returns the number of the nearest hash within the distance, the lowest of several; or -1.

        Takes a few hashes at a time: its memory grows with how many have a band in common.
        """
        best = np.full(len(hashes), _NOTHING)
        for level in self._levels:
            for band, (low, mask) in enumerate(self._bands):
                asked, place = level.sharing(band, (hashes >> low) & mask)
                apart = np.bitwise_count(hashes[asked] ^ level.hashes[place]).astype(np.int64)
                close = apart <= self.distance
                ranked = (apart[close] << _DISTANCE_SHIFT) + level.numbers[place[close]]
                np.minimum.at(best, asked[close], ranked)
        return np.where(best == _NOTHING, -1, best & ((1 << _DISTANCE_SHIFT) - 1))


_DISTANCE_SHIFT = 48  # a rank is a distance, then a number below 2^48
_NOTHING = np.iinfo(np.int64).max


class _Level:
    """Hashes in the order of each of their bands."""

    def __init__(
        self, hashes: Hashes, numbers: Int64Array, bands: list[tuple[np.uint64, np.uint64]]
    ) -> None:
        self.hashes = hashes
        self.numbers = numbers
        values = [(hashes >> low) & mask for low, mask in bands]
        self._orders = [np.argsort(value, kind="stable") for value in values]
        self._values = [value[order] for value, order in zip(values, self._orders, strict=True)]

    def sharing(self, band: int, asked: Hashes) -> tuple[Int64Array, Int64Array]:
        """Returns pairs: which of the values asked for, and the place of a hash that has it."""
        first = np.searchsorted(self._values[band], asked, "left")
        count = np.searchsorted(self._values[band], asked, "right") - first
        which = np.repeat(np.arange(len(asked)), count)
        start_of_run = np.cumsum(count) - count
        within_run = np.arange(len(which)) - start_of_run[which]
        return which, self._orders[band][first[which] + within_run]


def _first_bits(digests: pa.ChunkedArray) -> Hashes:
    """Returns the first 64 bits of digests in hex: a hundred million may share these safely."""
    return np.fromiter((int(digest[:16], 16) for digest in digests.to_pylist()), np.uint64)


def _bits(hashes: pa.ChunkedArray) -> Hashes:
    bits: Hashes = hashes.to_numpy().view(np.uint64)
    return bits
