"""The order in which training meets a split, by arithmetic alone.

An example is one text of one sample: (row, text_index). The stream of examples is an endless row
of epochs. Each epoch permutes the shards, cuts them into windows of a few shards, and shuffles the
examples of a window jointly, so that a reader touches few shards at a time. Step s takes positions
[s * B, (s + 1) * B) of the stream; a step may span epochs. Nothing is remembered between steps.
Of the whole split only totals of its shards are known, and the rows of a window when it is met.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.data.read.dataset import TextKind
from pipeline.data.read.rows import ShardTotals
from pipeline.errors import ConfigError

Int64Array = npt.NDArray[np.int64]


class Countable(Protocol):
    """What the order asks of a split, whose rows are numbered shard by shard."""

    @property
    def name(self) -> str: ...

    def totals(self, kind: TextKind) -> ShardTotals:
        """What is known of all shards at once."""
        ...

    def counts(self, kind: TextKind, shard: int) -> npt.NDArray[np.int32]:
        """Texts of this kind in each row of a shard."""
        ...


@dataclass(frozen=True)
class Examples:
    """Consecutive examples of the stream, and for each the row of another sample."""

    rows: Int64Array
    text_index: Int64Array
    distractors: Int64Array  # rows of other samples that have texts, or -1 where there is no other

    def __getitem__(self, part: slice | Int64Array) -> "Examples":
        return Examples(self.rows[part], self.text_index[part], self.distractors[part])


class Order:
    """The examples of any step, as a pure function of (split, kind, seed, window_shards).

    Raises ConfigError if the split has no text of this kind.
    """

    def __init__(self, split: Countable, kind: TextKind, seed: int, window_shards: int = 8) -> None:
        if seed < 0 or window_shards < 1:
            raise ConfigError(
                f"order: found seed={seed} and window_shards={window_shards}; "
                "expected seed >= 0 and window_shards >= 1"
            )
        self.kind = kind
        self.seed = seed
        self._window_shards = window_shards
        self._counts = partial(split.counts, kind)
        totals = split.totals(kind)
        self._shard_starts = np.concatenate([[0], np.cumsum(totals.num_rows)])
        self._shard_sizes = totals.num_texts  # in examples
        self._rows_with_texts = RowsWithTexts(split, kind)
        self.num_examples = int(totals.num_texts.sum())
        self.has_distractors = len(self._rows_with_texts) > 1
        if not self.num_examples:
            raise ConfigError(
                f"split {split.name!r} has no {kind}; choose another split, or another source"
            )
        # A rank reads a few micro-batches ahead, so that it may stand in two epochs or windows.
        self._epoch = lru_cache(maxsize=2)(self._shuffle_shards)
        self._window = lru_cache(maxsize=4)(self._shuffle_window)

    def examples(self, step: int, global_batch_size: int) -> tuple[Int64Array, Int64Array]:
        """Returns rows (B,) and text_index (B,) of one step."""
        found = self.between(step * global_batch_size, (step + 1) * global_batch_size)
        return found.rows, found.text_index

    def distractors(self, step: int, global_batch_size: int) -> Int64Array:
        """Returns for each example of one step the row (B,) of another sample of its window.

        Evenly drawn among the samples that have texts; from the whole split where the window has
        no second one; -1 where the split has none.
        """
        return self.between(step * global_batch_size, (step + 1) * global_batch_size).distractors

    def between(self, start: int, stop: int) -> Examples:
        """Returns the examples at positions [start, stop) of the stream, at least one."""
        parts = []
        while start < stop:
            epoch, place = divmod(start, self.num_examples)
            _, window_starts = self._epoch(epoch)
            window = int(np.searchsorted(window_starts, place, side="right")) - 1
            taken = min(stop - start, int(window_starts[window + 1]) - place)
            place -= int(window_starts[window])
            parts.append(self._window(epoch, window)[place : place + taken])
            start += taken
        return Examples(
            np.concatenate([part.rows for part in parts]),
            np.concatenate([part.text_index for part in parts]),
            np.concatenate([part.distractors for part in parts]),
        )

    def window(self, position: int) -> tuple[Int64Array, int]:
        """Returns the shards of the window that holds a position, and where the next one starts."""
        epoch, place = divmod(position, self.num_examples)
        shards, window_starts = self._epoch(epoch)
        window = int(np.searchsorted(window_starts, place, side="right")) - 1
        first = window * self._window_shards
        next_start = epoch * self.num_examples + int(window_starts[window + 1])
        return shards[first : first + self._window_shards], next_start

    def _shuffle_shards(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """Returns the epoch's shards in order, and where in it each window starts (and it ends)."""
        shards = permutation(random_bits(len(self._shard_sizes), self.seed, epoch))
        ends = np.concatenate([[0], np.cumsum(self._shard_sizes[shards])])
        return shards, np.append(ends[: -1 : self._window_shards], ends[-1])

    def _shuffle_window(self, epoch: int, window: int) -> Examples:
        shards, _ = self._epoch(epoch)
        shards = shards[window * self._window_shards : (window + 1) * self._window_shards]
        counts_of = [self._counts(shard) for shard in shards.tolist()]
        rows = np.concatenate(
            [
                self._shard_starts[shard] + np.flatnonzero(counts)
                for shard, counts in zip(shards.tolist(), counts_of, strict=True)
            ]
        )
        counts = np.concatenate([counts[counts > 0] for counts in counts_of])
        size = int(counts.sum())

        bits = random_bits(2 * size, self.seed, epoch, window + 1)
        shuffled = permutation(bits[:size])
        place = np.repeat(np.arange(len(rows)), counts)[shuffled]
        text_index = shuffled - (np.cumsum(counts) - counts)[place]

        if len(rows) > 1:
            return Examples(rows[place], text_index, rows[_others(place, bits[size:], len(rows))])
        if not self.has_distractors:
            return Examples(rows[place], text_index, np.full(size, -1))
        (shard,) = (shard for shard in shards.tolist() if self._shard_sizes[shard])
        everywhere = self._rows_with_texts
        places = np.full(size, everywhere.first_of_shard(shard))
        others = everywhere[_others(places, bits[size:], len(everywhere))]
        return Examples(rows[place], text_index, others)


class RowsWithTexts:
    """The rows of a split that have texts of a kind, in order, of which none is held."""

    def __init__(self, split: Countable, kind: TextKind) -> None:
        self._counts = partial(split.counts, kind)
        totals = split.totals(kind)
        self._shard_starts = np.concatenate([[0], np.cumsum(totals.num_rows)])
        self._firsts = np.concatenate([[0], np.cumsum(totals.num_rows_with_texts)])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, places: Int64Array) -> Int64Array:
        """Returns the rows at some places among them."""
        shards = np.searchsorted(self._firsts, places, side="right") - 1
        rows = np.empty_like(places)
        for shard in np.unique(shards).tolist():
            here = shards == shard
            inside = np.flatnonzero(self._counts(shard))[places[here] - self._firsts[shard]]
            rows[here] = self._shard_starts[shard] + inside
        return rows

    def first_of_shard(self, shard: int) -> int:
        """Returns the place of a shard's first one."""
        return int(self._firsts[shard])


class RowOrder:
    """Every example of a split once, in the order of its rows: as (row, text_index)."""

    def __init__(self, split: Countable, kind: TextKind) -> None:
        self.kind = kind
        self._counts = partial(split.counts, kind)
        totals = split.totals(kind)
        self._shard_starts = np.concatenate([[0], np.cumsum(totals.num_rows)])
        self._first_examples = np.concatenate([[0], np.cumsum(totals.num_texts)])
        self.num_examples = int(self._first_examples[-1])

    def between(self, start: int, stop: int) -> tuple[Int64Array, Int64Array]:
        """Returns rows and text_index of the examples at positions [start, stop)."""
        rows, text_index = np.empty((2, stop - start), np.int64)
        first, last = np.searchsorted(self._first_examples, (start, stop - 1), side="right") - 1
        for shard in range(int(first), int(last) + 1):
            offset = int(self._first_examples[shard])
            here = slice(max(offset, start) - start, int(self._first_examples[shard + 1]) - start)
            ends = np.cumsum(self._counts(shard), dtype=np.int64)
            positions = np.arange(start, stop)[here] - offset
            inside = np.searchsorted(ends, positions, side="right")
            rows[here] = self._shard_starts[shard] + inside
            text_index[here] = positions - np.concatenate([[0], ends])[inside]
        return rows, text_index


def _others(places: Int64Array, bits: npt.NDArray[np.uint64], count: int) -> Int64Array:
    """Returns for each place among `count` another one, evenly drawn by a random word each."""
    skip = 1 + (bits % np.uint64(count - 1)).astype(np.int64)
    return (places + skip) % count


def permutation(bits: npt.NDArray[np.uint64]) -> Int64Array:
    """Returns 0 .. n - 1 in the order of n random words; n below 2 ** 32.

    The number itself rides in the low bits: no two words are equal, so that every sorting
    algorithm gives the same order, and values sort several times faster than places.
    """
    low = np.uint64(max(len(bits) - 1, 1).bit_length())
    words = (bits << low) | np.arange(len(bits), dtype=np.uint64)
    words.sort()
    return (words & ((np.uint64(1) << low) - np.uint64(1))).astype(np.int64)


def random_bits(count: int, *key: int) -> npt.NDArray[np.uint64]:
    """Returns `count` random words of 64 bits.

    Raw PCG64 bits, because numpy promises that these never change, while
    `Generator.permutation` may with any release and would break a resumed run.
    """
    generator = np.random.PCG64(np.random.SeedSequence(key[0], spawn_key=key[1:]))
    return generator.random_raw(count)
