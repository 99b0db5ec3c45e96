"""The mixture of several splits: from which of them each position of the stream is taken.

The stream is cut into blocks of a fixed size. Each split has the same number of places in every
block, as its weight says, in an order shuffled anew for each block. So a position's split, and
how many examples of that split came before, are arithmetic on (weights, seed, position), and each
split is met in its own order, epoch after epoch of its own, whatever the others are.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from zlib import crc32

import numpy as np
import numpy.typing as npt

from pipeline.data.load.order import Examples, Order, permutation, random_bits
from pipeline.data.read.buffers import BufferPool
from pipeline.data.read.dataset import Reading, Split
from pipeline.data.read.features import merged
from pipeline.data.read.rows import Rows
from pipeline.data.sample import TextKind, Texts
from pipeline.data.tars.members import Int64Array
from pipeline.errors import ConfigError

BLOCK_SIZE = 4096  # places; a weight is rounded to a multiple of 1 / BLOCK_SIZE, and at least that
_SALT = crc32(b"mixture")


class MixedOrder:
    """The examples of several orders, mixed by weight; rows are numbered as in `MixedSplit`.

    Weights say how often examples are taken, whatever the splits' sizes; their sum does not
    matter. Raises ConfigError if they do not fit the orders.
    """

    def __init__(
        self, split: "MixedSplit", orders: Sequence[Order], weights: Sequence[float], seed: int
    ) -> None:
        self._split = split
        self._orders = tuple(orders)
        self._quotas = quotas(weights, BLOCK_SIZE)
        if len(self._quotas) != len(orders):
            raise ConfigError(f"{len(orders)} splits are mixed by {len(weights)} weights")
        self._seed = seed
        self.kind = orders[0].kind
        self.num_examples = sum(order.num_examples for order in orders)
        self.has_distractors = all(order.has_distractors for order in orders)
        self._block = lru_cache(maxsize=8)(self._shuffle_block)

    def between(self, start: int, stop: int) -> Examples:
        """Returns the examples at positions [start, stop) of the stream, at least one."""
        blocks = range(start // BLOCK_SIZE, (stop - 1) // BLOCK_SIZE + 1)
        asked = slice(start - blocks[0] * BLOCK_SIZE, stop - blocks[0] * BLOCK_SIZE)
        sources = np.concatenate([self._block(block) for block in blocks])[asked]
        places = np.concatenate([self._ranks(block) for block in blocks])[asked]
        rows, text_index, distractors = np.empty((3, stop - start), np.int64)
        for number, order in enumerate(self._orders):
            chosen = np.flatnonzero(sources == number)
            if not len(chosen):
                continue
            # Of one split the places follow each other without a gap.
            found = order.between(int(places[chosen[0]]), int(places[chosen[-1]]) + 1)
            first_row = self._split.first_rows[number]
            rows[chosen] = found.rows + first_row
            text_index[chosen] = found.text_index
            is_none = found.distractors < 0
            distractors[chosen] = np.where(is_none, -1, found.distractors + first_row)
        return Examples(rows, text_index, distractors)

    def window(self, position: int) -> tuple[Int64Array, int]:
        """Returns the shards that are read from a position on, and where others are needed."""
        block, offset = divmod(position, BLOCK_SIZE)
        shards, ends = [], []
        for number, order in enumerate(self._orders):
            before = int(np.count_nonzero(self._block(block)[:offset] == number))
            found, end = order.window(block * int(self._quotas[number]) + before)
            shards.append(found + self._split.first_shards[number])
            ends.append(self._position(number, end))
        return np.concatenate(shards), min(ends)

    def _position(self, number: int, place: int) -> int:
        """Returns where in the stream an example of a split stands."""
        block, rank = divmod(place, int(self._quotas[number]))
        return block * BLOCK_SIZE + int(np.flatnonzero(self._block(block) == number)[rank])

    def _ranks(self, block: int) -> Int64Array:
        """Returns which example of its split's stream stands at each place of a block."""
        sources = self._block(block)
        ranks = np.empty(BLOCK_SIZE, np.int64)
        for number, quota in enumerate(self._quotas.tolist()):
            ranks[sources == number] = block * quota + np.arange(quota)
        return ranks

    def _shuffle_block(self, block: int) -> Int64Array:
        bits = random_bits(BLOCK_SIZE, self._seed, _SALT, block)
        return np.repeat(np.arange(len(self._quotas)), self._quotas)[permutation(bits)]


class MixedSplit:
    """Several splits, whose rows are numbered one split after the other."""

    def __init__(self, splits: Sequence[Split]) -> None:
        if len({split.has_features for split in splits}) != 1:
            raise ConfigError("either all or none of the splits that are mixed have features")
        self._splits = tuple(splits)
        sizes = [split.num_samples for split in splits]
        self.first_rows = np.cumsum([0, *sizes])[:-1]
        self.first_shards = np.cumsum([0, *(split.num_shards for split in splits)])[:-1]
        self.num_samples = sum(sizes)
        self.name = " + ".join(split.name for split in splits)
        self.is_local = all(split.is_local for split in splits)
        self.has_features = splits[0].has_features
        self.is_augmented = any(split.is_augmented for split in splits)
        self._pool = BufferPool()

    def keys(self, rows: Rows) -> list[str]:
        """Returns the keys of the samples of these rows; of a split each is there only once."""
        keys = np.empty(len(rows), object)
        for split, places, own in self._parts(np.asarray(rows, np.int64)):
            keys[places] = split.keys(own)
        found: list[str] = keys.tolist()
        return found

    def read(
        self,
        rows: Int64Array,
        kind: TextKind | None = None,
        rng: Callable[[int], np.random.Generator] | None = None,
    ) -> Reading:
        """Reads all that a batch has of these rows, features padded to the most regions.

        Where several splits are met this copies what was read, at about the cost of reading it.
        Raises FeatureError if splits have other kinds of features.
        """
        keys = np.empty(len(rows), object)
        texts: list[Texts] = [Texts(0)] * len(rows)
        features = []
        for split, places, own in self._parts(rows):
            found = split.read(own, kind, None if rng is None else partial(_at, rng, places))
            keys[places] = found.keys
            for place, each in zip(places.tolist(), found.texts, strict=True):
                texts[place] = each
            if found.features is not None:
                features.append((places, found.features))
        batch = merged(features, self._pool) if features else None
        return Reading(keys.tolist(), texts, batch)

    def texts(self, rows: Int64Array, kind: TextKind | None = None) -> list[Texts]:
        """Reads what people wrote about the images of these rows, or of that only one kind."""
        texts: list[Texts] = [Texts(0)] * len(rows)
        for split, places, own in self._parts(rows):
            for place, found in zip(places.tolist(), split.texts(own, kind), strict=True):
                texts[place] = found
        return texts

    def fetch(self, shards: Int64Array) -> None:
        """Brings what a loader reads of these shards into the cache, if they are far away."""
        numbers = np.searchsorted(self.first_shards, shards, side="right") - 1
        for number in np.unique(numbers).tolist():
            own = shards[numbers == number] - self.first_shards[number]
            self._splits[number].fetch(own)

    def _parts(self, rows: Int64Array) -> list[tuple[Split, Int64Array, Int64Array]]:
        """Returns the splits that are met, with the places in `rows` and the rows of their own."""
        numbers = np.searchsorted(self.first_rows, rows, side="right") - 1
        parts = []
        for number in np.unique(numbers).tolist():
            places = np.flatnonzero(numbers == number)
            parts.append((self._splits[number], places, rows[places] - self.first_rows[number]))
        return parts


def _at(
    rng: Callable[[int], np.random.Generator], places: Int64Array, i: int
) -> np.random.Generator:
    return rng(int(places[i]))


def quotas(weights: Sequence[float], size: int) -> npt.NDArray[np.int64]:
    """Returns how many of `size` places each weight gets, by largest remainders, at least one.

    Raises ConfigError if a weight is not a positive number.
    """
    given = np.array(weights, np.float64)
    if not (len(given) and np.isfinite(given).all() and (given > 0).all()):
        raise ConfigError(f"weights: found {list(weights)}; expected positive numbers")
    exact = given / given.sum() * size
    shares: npt.NDArray[np.int64] = np.maximum(np.floor(exact).astype(np.int64), 1)
    while lacking := size - int(shares.sum()):
        # The next place goes to, or comes from, whoever is furthest from what it should have.
        gap = exact - shares
        if lacking > 0:
            shares[np.argmax(gap)] += 1
        else:
            shares[np.argmin(np.where(shares > 1, gap, np.inf))] -= 1
    return shares
