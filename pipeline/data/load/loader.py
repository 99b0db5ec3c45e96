"""The loader: a rank's batches of each step, read ahead of their consumer."""

import contextlib
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipeline.config import Config, Fixed, Free
from pipeline.data.load.grouping import group, length
from pipeline.data.load.mixture import MixedOrder, MixedSplit
from pipeline.data.load.order import Examples, Order, RowOrder
from pipeline.data.read.dataset import FeatureBatch, Split, TextKind
from pipeline.data.sample import Texts
from pipeline.errors import ConfigError, ShardError
from pipeline.look_ahead import map_ahead

Int64Array = npt.NDArray[np.int64]
AnySplit = Split | MixedSplit
AnyOrder = Order | MixedOrder
Place = TypeVar("Place")

_FETCH_THREADS = 4  # shards copied at a time
_AUGMENT_SALT = zlib.crc32(b"augment")


def share(size: int, rank: int, world_size: int) -> range:
    """Returns a rank's places among `size`: as many as another's, or one less."""
    return range(rank * size // world_size, (rank + 1) * size // world_size)


class BatchConfig(Config):
    """How the samples of a step are divided among ranks, and a rank's among its micro-batches."""

    global_batch_size: Fixed[int] = Field(
        ge=1, description="samples per step, over all ranks and passes"
    )
    micro_batch_size: Free[int] = Field(
        ge=1, description="the most that one rank holds in one forward pass"
    )

    def share(self, rank: int, world_size: int) -> range:
        """Returns a rank's positions in the global batch: as many as another's, or one less."""
        return share(self.global_batch_size, rank, world_size)

    def accumulation_steps(self, world_size: int) -> int:
        """Returns the micro-batches a step of the rank that has most, or raises ConfigError."""
        if world_size > self.global_batch_size:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} leaves some of {world_size} ranks "
                "without a sample; use fewer ranks or a larger one"
            )
        largest_share = -(-self.global_batch_size // world_size)
        return -(-largest_share // self.micro_batch_size)


@dataclass(frozen=True)
class Batch:
    """B examples as one forward pass takes them: each is one text of one sample."""

    keys: list[str]
    rows: Int64Array  # (B,) of the split
    positions: Int64Array  # (B,) places in the global batch; in an evaluation, in all of it
    texts: list[Texts]  # of each sample all texts of the kind that the examples are
    text_index: Int64Array  # (B,) which caption, question or round of the sample is meant
    distractors: list[Texts]  # the texts of another sample for each example; empty if not asked for
    features: FeatureBatch | None  # None if the split was opened without
    step: int
    seed: int

    def rng(self, i: int, *salt: int) -> np.random.Generator:
        """Returns the only randomness that example i may use.

        A function of the seed, the step, the example's place in the global batch, and the salt
        that tells one use from another; so that ranks and micro-batches do not matter.
        """
        return _rng(self.seed, self.step, self.positions[i], *salt)


def _rng(seed: int, step: int, position: np.int64, *salt: int) -> np.random.Generator:
    identity = (seed, step, int(position))
    return np.random.default_rng(np.random.SeedSequence(identity, spawn_key=salt))


class Loader:
    """Gives each rank its micro-batches of each step of an order.

    `seed` is that of the batches' `rng`; the order has its own. With `group_by`, the kind of text
    that the order is of, micro-batches are grouped by its length. `threads` read up to `prefetch`
    micro-batches ahead. Raises ConfigError if distractors are asked for and there is one sample.
    """

    def __init__(
        self,
        split: AnySplit,
        order: AnyOrder,
        *,
        global_batch_size: int,
        seed: int,
        distractors: bool = False,
        group_by: TextKind | None = None,
        threads: int = 2,
        prefetch: int = 4,
    ) -> None:
        if distractors and not order.has_distractors:
            raise ConfigError(
                f"split {split.name!r} has texts of one sample only; an objective that compares "
                "an image with another's text needs two"
            )
        self.num_examples = order.num_examples  # of an epoch
        self._split = split
        self._order = order
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._distractors = distractors
        self._group_by = group_by
        self._threads = threads
        self._prefetch = prefetch

    def batches(
        self, start_step: int, stop_step: int, rank: int, world_size: int, micro_batch_size: int
    ) -> Generator[list[Batch], None, None]:
        """Yields for each step in [start_step, stop_step) the rank's micro-batches.

        Rank r of W holds positions [r * B / W, (r + 1) * B / W) of a global batch of B, in order
        or grouped by length, in as many micro-batches as another rank (or one less, if these are
        of one sample), whose sizes differ by one at most. An error of a reading thread is raised at
        its step. Closing the iterator, or its end, ends the threads. Raises ConfigError at once if
        there are fewer examples, in a step or in all, than ranks.
        """
        config = BatchConfig(
            global_batch_size=self._global_batch_size, micro_batch_size=micro_batch_size
        )
        positions = config.share(rank, world_size)
        num_micro_batches = min(len(positions), config.accumulation_steps(world_size))
        if world_size > self._order.num_examples:
            raise ConfigError(
                f"split {self._split.name!r} has {self._order.num_examples} examples, fewer than "
                f"the {world_size} ranks; use fewer"
            )
        share = _Share(
            self._split,
            self._order,
            self._global_batch_size,
            positions,
            num_micro_batches,
            self._group_by,
        )
        places = (
            (step, i) for step in range(start_step, stop_step) for i in range(num_micro_batches)
        )
        fetcher = _Fetcher(self._split, self._order)
        read = partial(self._read, share, fetcher)
        batches = _read_ahead(read, places, self._threads, self._prefetch, fetcher.close)
        return _steps(batches, num_micro_batches)

    def at(self, places: Iterable[range], step: int) -> Generator[Batch, None, None]:
        """Yields the examples at places of the order's stream, a batch for each range.

        An example's `rng` is that of its place and this step, however places are cut into batches.
        Threads and errors as in `batches`.
        """
        fetcher = _Fetcher(self._split, self._order)

        def read(place: range) -> Batch:
            fetcher.reach(place.start)
            examples = self._order.between(place.start, place.stop)
            return self._batch(np.arange(place.start, place.stop), examples, step)

        return _read_ahead(read, iter(places), self._threads, self._prefetch, fetcher.close)

    def _read(self, share: "_Share", fetcher: "_Fetcher", place: tuple[int, int]) -> Batch:
        step, i = place
        fetcher.reach(share.start(step, i))
        return self._batch(*share.micro_batch(step, i), step)

    def _batch(self, positions: Int64Array, examples: Examples, step: int) -> Batch:
        return _batch(
            self._split,
            examples.rows,
            examples.text_index,
            positions=positions,
            distractors=examples.distractors if self._distractors else None,
            kind=self._order.kind,
            step=step,
            seed=self._seed,
        )


class _Share:
    """Which examples of each step one rank has, and in which of its micro-batches."""

    def __init__(
        self,
        split: AnySplit,
        order: AnyOrder,
        global_batch_size: int,
        positions: range,
        num_micro_batches: int,
        group_by: TextKind | None,
    ) -> None:
        self._split = split
        self._order = order
        self._global_batch_size = global_batch_size
        self._positions = positions
        self._in_order = np.array_split(np.arange(len(positions)), num_micro_batches)
        self._group_by = group_by
        self._lock = threading.Lock()
        # Threads read the micro-batches of a step or two at once.
        self._groups = lru_cache(maxsize=4)(self._group)

    def start(self, step: int, i: int) -> int:
        """Returns where a micro-batch, if not grouped, begins in the order's stream."""
        return step * self._global_batch_size + self._positions.start + int(self._in_order[i][0])

    def micro_batch(self, step: int, i: int) -> tuple[Int64Array, Examples]:
        """Returns positions in the global batch, and the examples there."""
        if self._group_by is None:
            places = self._in_order[i]
            start = self.start(step, i)
            found = self._order.between(start, start + len(places))
        else:
            with self._lock:
                places = self._groups(step)[i]
            found = self._all(step)[places]
        return self._positions.start + places, found

    def _all(self, step: int) -> Examples:
        start = self.start(step, 0)
        return self._order.between(start, start + len(self._positions))

    def _group(self, step: int) -> list[Int64Array]:
        assert self._group_by is not None
        found = self._all(step)
        texts = self._split.texts(found.rows, self._group_by)
        lengths = [
            length(each, self._group_by, index)
            for each, index in zip(texts, found.text_index.tolist(), strict=True)
        ]
        return group(lengths, len(self._in_order))


class _Fetcher:
    """Copies shards of an object store to this machine before they are read.

    The window of shards that is being read and the next one: while the one is read, the other
    comes. All ranks of a machine read the same windows and share the copies.
    """

    def __init__(self, split: AnySplit, order: AnyOrder) -> None:
        self._split = split
        self._order = order
        self._is_local = split.is_local
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="sightline-fetch")
        self._last = -1  # where the last window starts that was asked for
        self._next: int | None = None

    def reach(self, position: int) -> None:
        """Says that this position of the stream is about to be read."""
        if self._is_local:
            return
        with self._lock:
            if self._next is None:
                self._next = position
            while self._last <= position:
                shards, end = self._order.window(self._next)
                for shard in shards:
                    self._pool.submit(self._fetch, shard)
                self._last, self._next = self._next, end

    def close(self) -> None:
        """Ends the threads; a copy in the making is finished."""
        self._pool.shutdown(cancel_futures=True)

    def _fetch(self, shard: np.int64) -> None:
        with contextlib.suppress(ShardError):  # raised again, for a sample, where it is read
            self._split.fetch(np.array([shard]))


def eval_batches(
    split: Split,
    kind: TextKind,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    *,
    threads: int = 2,
    prefetch: int = 4,
) -> Generator[Batch, None, None]:
    """Yields every example of a split exactly once over all ranks, in row order.

    Rank r of W holds examples [r * N / W, (r + 1) * N / W) of N; the last batch may be smaller.
    `positions` are the examples' places in the split, and step and seed are 0, so that an
    example's `rng` depends on neither batch size nor ranks. Threads as in `Loader.batches`.
    """
    order = RowOrder(split, kind)
    stop = (rank + 1) * order.num_examples // world_size

    def read(first: int) -> Batch:
        end = min(first + batch_size, stop)
        rows, text_index = order.between(first, end)
        positions = np.arange(first, end)
        return _batch(split, rows, text_index, positions, None, kind, step=0, seed=0)

    firsts = range(rank * order.num_examples // world_size, stop, batch_size)
    return _read_ahead(read, iter(firsts), threads, prefetch)


def _batch(
    split: AnySplit,
    rows: Int64Array,
    text_index: Int64Array,
    positions: Int64Array,
    distractors: Int64Array | None,
    kind: TextKind,
    step: int,
    seed: int,
) -> Batch:
    def rng(i: int) -> np.random.Generator:
        return _rng(seed, step, positions[i], _AUGMENT_SALT)

    found = split.read(rows, None if split.is_augmented else kind, rng)
    return Batch(
        keys=found.keys,
        rows=rows,
        positions=positions,
        texts=found.texts,
        text_index=text_index,
        distractors=[] if distractors is None else split.texts(distractors, kind),
        features=found.features,
        step=step,
        seed=seed,
    )


def _steps(
    batches: Generator[Batch, None, None], num_micro_batches: int
) -> Generator[list[Batch], None, None]:
    with closing(batches):
        while step := list(islice(batches, num_micro_batches)):
            yield step


def _read_ahead(
    read: Callable[[Place], Batch],
    places: Iterator[Place],
    threads: int,
    prefetch: int,
    close: Callable[[], None] = lambda: None,
) -> Generator[Batch, None, None]:
    """Yields `read(place)` of each place in turn, `prefetch` of them being read meanwhile.

    `close` is called when no thread reads any more.
    """
    try:
        yield from map_ahead(read, places, threads, prefetch, "sightline-loader")
    finally:
        close()
