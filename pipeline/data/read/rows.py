"""The rows of a split, which come a shard at a time as they are asked for.

A split holds the totals of its shards; where its samples lie stands in the index, from which the
last few shards are kept.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.data.manifest.index import DamagedIndexError, Index, ShardRows
from pipeline.data.manifest.schema import foreign_tars
from pipeline.data.sample import TextKind
from pipeline.data.tars.foreign_tar import ForeignTar, Location
from pipeline.data.tars.members import Int64Array, Places
from pipeline.data.tars.shard import shard_location
from pipeline.errors import ManifestError

SHARDS_HELD = 24  # two windows of an order, the one that is read and the next, and some

_WINDOWS_JOINED = 3
_ROWS_A_SHARD_TO_JOIN = 8  # of a batch; with fewer, batches of a window meet different shards

Rows = Sequence[int] | Int64Array


@dataclass(frozen=True)
class ShardTotals:
    """What each shard of a split has of one kind of text."""

    num_rows: Int64Array  # (num_shards,)
    num_texts: Int64Array  # (num_shards,)
    num_rows_with_texts: Int64Array  # (num_shards,)


@dataclass(frozen=True)
class Located:
    """What the index has of B rows."""

    shards: Int64Array  # (B,)
    keys: npt.NDArray[np.object_]  # (B,) str
    numbers: Int64Array  # (B, C)
    columns: Mapping[str, int]  # of `numbers`

    @property
    def num_regions(self) -> Int64Array:
        """The regions that the features have: (B,)."""
        return self.numbers[:, self.columns["num_regions"]]

    def places(self, part: str) -> Places:
        """Returns where the `image` or the `texts` lie, in the files of the split."""
        return self._places(self.numbers[:, self.columns[f"{part}_file"]], part)

    def feature_places(self, part: str) -> Places:
        """Returns where an array of the features lies, in the sidecars of the shards.

        Its offset is -1 where a sample has none.
        """
        return self._places(self.shards, part)

    def _places(self, files: Int64Array, part: str) -> Places:
        offsets = self.numbers[:, self.columns[f"{part}_offset"]]
        return Places(files, offsets, self.numbers[:, self.columns[f"{part}_size"]], self.keys)


class SplitRows:
    """The rows of one split, numbered shard by shard. Any number of threads may ask at once.

    `remake` returns the same index, made anew, when the one that it is given is damaged at a shard.
    """

    def __init__(self, index: Index, split: str, remake: Callable[[Index, int], Index]) -> None:
        self._index = index
        self._remake = remake
        self._lock = threading.Lock()
        of_split = index.shards.filter(pc.equal(index.shards["split"], split))
        self.num_rejects: int = pc.sum(of_split["num_rejects"]).as_py() or 0
        self.num_missing: int = pc.sum(of_split["num_missing"]).as_py() or 0
        missing = of_split["first_missing"].drop_null()
        self.first_missing: str | None = missing[0].as_py() if self.num_missing else None
        is_here = pc.and_(
            pc.equal(index.shards["split"], split), pc.greater(index.shards["num_rows"], 0)
        )
        number = np.flatnonzero(np.asarray(is_here))
        self._number = number  # of each shard, in the index
        self._shards = index.shards.take(pa.array(number)).combine_chunks()
        self.starts = np.concatenate([[0], np.cumsum(self._total("num_rows"))])
        self._columns = {name: i for i, name in enumerate(index.columns)}
        self._of_shard = lru_cache(maxsize=SHARDS_HELD)(self._read)
        # Batches of one window meet the same shards: one step for all of them, not one for each.
        self._joined = lru_cache(maxsize=_WINDOWS_JOINED)(self._join)

    @property
    def num_rows(self) -> int:
        """The rows of all shards."""
        return int(self.starts[-1])

    @property
    def num_shards(self) -> int:
        """The shards that have rows."""
        return len(self._number)

    @property
    def parts(self) -> frozenset[str]:
        """The arrays that some row's features have."""
        return frozenset(self._index.parts or ())

    def shard_name(self, shard: int) -> str:
        """Returns the name of a shard, without .tar."""
        name: str = self._shards["shard"][shard].as_py()
        return name

    def totals(self, kind: TextKind) -> ShardTotals:
        """Returns what each shard has of one kind of text."""
        return ShardTotals(
            self._total("num_rows"), self._total(f"num_{kind}"), self._total(f"num_with_{kind}")
        )

    def counts(self, kind: TextKind, shard: int) -> npt.NDArray[np.int32]:
        """Returns how many captions, questions or dialog rounds each row of a shard has."""
        numbers = self._of_shard(shard).numbers
        return numbers[:, self._columns[f"num_{kind}"]].astype(np.int32)

    def located(self, rows: Rows) -> Located:
        """Returns what is known of some rows, in any order."""
        rows = np.asarray(rows, np.int64)
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        inside = rows - self.starts[shards]
        met = sorted(set(shards.tolist()))
        if len(rows) >= _ROWS_A_SHARD_TO_JOIN * len(met):
            parts, firsts = self._joined(tuple(met))
            at = firsts[np.searchsorted(met, shards)] + inside
            return Located(shards, parts.keys[at], parts.numbers[at], self._columns)
        keys = np.empty(len(rows), object)
        numbers = np.empty((len(rows), len(self._columns)), np.int64)
        for shard in met:
            here = np.flatnonzero(shards == shard)
            found = self._of_shard(shard)
            keys[here] = found.keys[inside[here]]
            numbers[here] = found.numbers[inside[here]]
        return Located(shards, keys, numbers, self._columns)

    def of_shard(self, shard: int) -> Located:
        """Returns what is known of the rows of a shard."""
        found = self._of_shard(shard)
        shards = np.full(len(found.keys), shard)
        return Located(shards, found.keys, found.numbers, self._columns)

    def _join(self, shards: tuple[int, ...]) -> tuple[ShardRows, Int64Array]:
        """Returns the rows of some shards as one, and where in it each shard begins."""
        parts = [self._of_shard(shard) for shard in shards]
        firsts = np.cumsum([0, *(len(part.keys) for part in parts[:-1])])
        numbers = np.concatenate([part.numbers for part in parts])
        return ShardRows(np.concatenate([part.keys for part in parts]), numbers), firsts

    def _total(self, column: str) -> Int64Array:
        found: Int64Array = self._shards[column].to_numpy()
        return found

    def _read(self, shard: int) -> ShardRows:
        number = int(self._number[shard])
        index = self._index
        try:
            return index.rows(number)
        except DamagedIndexError:
            with self._lock:
                if self._index is index:
                    self._index = self._remake(index, number)
        try:
            return self._index.rows(number)
        except DamagedIndexError as error:
            raise ManifestError(
                f"{error}; the index was made anew just now: does something else write there?"
            ) from error


class DatasetFiles:
    """The files that images and texts of a dataset lie in, as the index numbers them."""

    def __init__(self, url: str, index: Index) -> None:
        self._url = url
        self._files = index.files

    @property
    def tars_are_local(self) -> bool:
        """Whether the tars of others, if there are any, are on this machine."""
        tars, _ = foreign_tars(self._files["tar"])
        return all(storage.is_local(tar.location) for tar in tars)

    def location(self, number: int) -> Location:
        """Returns the file of a number."""
        file = self._files.slice(number, 1).to_pylist()[0]
        if file["tar"] is not None:
            return ForeignTar(**file["tar"])
        return shard_location(self._url, file["split"], file["shard"])
