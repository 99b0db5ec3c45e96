from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.load.order import Examples, Order, permutation, random_bits
from pipeline.data.read.dataset import TextKind
from pipeline.data.read.rows import ShardTotals
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Table:
    """A split reduced to its counts: five shards of unequal size, some rows without texts."""

    row_counts: tuple[int, ...] = (2, 0, 3, 1, 1, 0, 4, 2, 1, 0, 5, 1)
    starts: tuple[int, ...] = (0, 3, 4, 7, 11, 12)
    name: str = "train"

    @property
    def shard_starts(self) -> np.ndarray:
        return np.array(self.starts)

    def all_counts(self, kind: TextKind) -> np.ndarray:
        return np.array(self.row_counts, np.int32) * (kind == "captions")

    def counts(self, kind: TextKind, shard: int) -> np.ndarray:
        return self.all_counts(kind)[self.starts[shard] : self.starts[shard + 1]]

    def totals(self, kind: TextKind) -> ShardTotals:
        shards = [self.counts(kind, shard) for shard in range(len(self.starts) - 1)]
        return ShardTotals(
            np.array([len(counts) for counts in shards]),
            np.array([counts.sum() for counts in shards]),
            np.array([np.count_nonzero(counts) for counts in shards]),
        )


tables = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), min_size=1, max_size=6).map(
    lambda shards: Table(
        tuple(count for shard in shards for count in shard),
        tuple(int(start) for start in np.cumsum([0, *map(len, shards)])),
    )
)


def pairs(order: Order, start: int, stop: int) -> list[tuple[int, int]]:
    found = order.between(start, stop)
    return list(zip(found.rows.tolist(), found.text_index.tolist(), strict=True))


def examples_of(table: Table) -> list[tuple[int, int]]:
    return [(row, i) for row, count in enumerate(table.row_counts) for i in range(count)]


@settings(deadline=None)
@given(tables.filter(lambda table: sum(table.row_counts) > 0), st.integers(0, 9), st.integers(1, 4))
def test_every_epoch_holds_every_example_exactly_once(
    table: Table, seed: int, window_shards: int
) -> None:
    order = Order(table, "captions", seed, window_shards)
    for epoch in range(3):
        start = epoch * order.num_examples
        assert sorted(pairs(order, start, start + order.num_examples)) == examples_of(table)


@pytest.mark.slow
@settings(deadline=None)
@given(st.integers(0, 200), st.integers(1, 70), st.integers(1, 4))
def test_a_step_computed_directly_equals_the_same_step_of_the_stream(
    step: int, global_batch_size: int, window_shards: int
) -> None:
    order = Order(Table(), "captions", 5, window_shards)
    stop = (step + 1) * global_batch_size
    stream: list[tuple[int, int]] = []
    while len(stream) < stop:
        stream += pairs(order, len(stream), len(stream) + 1)
    rows, text_index = Order(Table(), "captions", 5, window_shards).examples(
        step, global_batch_size
    )
    assert list(zip(rows, text_index, strict=True)) == stream[stop - global_batch_size :]


def test_seeds_and_epochs_give_different_orders() -> None:
    first, second = (Order(Table(), "captions", seed) for seed in (1, 2))
    size = first.num_examples
    assert pairs(first, 0, size) != pairs(second, 0, size)
    assert pairs(first, 0, size) != pairs(first, size, 2 * size)


def test_the_order_never_changes_between_releases() -> None:
    rows, text_index = Order(Table(), "captions", 7, window_shards=2).examples(1, 6)
    assert rows.tolist() == [6, 6, 4, 6, 6, 11]
    assert text_index.tolist() == [0, 3, 0, 2, 1, 0]


@pytest.mark.parametrize("window_shards", [1, 2, 3])
def test_a_window_of_the_stream_stays_within_its_shards(window_shards: int) -> None:
    table = Table(tuple([1] * 60), tuple(range(0, 61, 5)))
    order = Order(table, "captions", 3, window_shards)
    shards = order.between(0, 60).rows // 5
    per_window = 5 * window_shards
    for start in range(0, 60, per_window):
        assert len(set(shards[start : start + per_window].tolist())) == window_shards


def test_examples_of_one_window_are_shuffled_jointly() -> None:
    table = Table(tuple([1] * 400), (0, 100, 200, 300, 400))
    shards = Order(table, "captions", 0, window_shards=4).between(0, 400).rows // 100
    first_half = np.bincount(shards[:200], minlength=4)
    assert (abs(first_half - 50) < 25).all()


@settings(deadline=None)
@given(tables.filter(lambda table: sum(table.row_counts) > 0), st.integers(1, 3))
def test_a_distractor_is_another_sample_that_has_texts(table: Table, window_shards: int) -> None:
    order = Order(table, "captions", 11, window_shards)
    found = order.between(0, 2 * order.num_examples)
    counts = table.all_counts("captions")
    if np.count_nonzero(counts) == 1:
        assert (found.distractors == -1).all()
    else:
        assert (found.distractors != found.rows).all()
        assert (counts[found.distractors] > 0).all()


def test_distractors_are_spread_over_all_the_other_samples_of_a_window() -> None:
    order = Order(Table((1, 1, 1, 1), (0, 2, 4)), "captions", 0)
    found = order.between(0, 4 * 300)
    for row in range(4):
        picks = np.bincount(found.distractors[found.rows == row], minlength=4)
        assert picks[row] == 0
        assert (np.delete(picks, row) > 60).all()


def test_distractors_of_a_step_are_those_of_its_examples() -> None:
    order = Order(Table(), "captions", 4)
    assert order.distractors(3, 7).tolist() == order.between(21, 28).distractors.tolist()


def test_a_split_without_texts_of_the_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="split 'train' has no questions"):
        Order(Table(), "questions", 0)


def test_a_negative_seed_or_an_empty_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed=-1"):
        Order(Table(), "captions", -1)
    with pytest.raises(ConfigError, match="window_shards=0"):
        Order(Table(), "captions", 0, window_shards=0)


@settings(deadline=None)
@given(tables.filter(lambda table: sum(table.row_counts) > 0), st.integers(1, 4))
def test_the_windows_follow_the_stream(table: Table, window_shards: int) -> None:
    order = Order(table, "captions", 3, window_shards)
    position = 0
    while position < 3 * order.num_examples:
        shards, end = order.window(position)
        assert end > position
        assert len(shards) <= window_shards
        rows = order.between(position, end).rows
        read = np.searchsorted(table.shard_starts, rows, side="right") - 1
        assert set(read.tolist()) <= set(shards.tolist())
        again, same_end = order.window(end - 1)
        assert (again.tolist(), same_end) == (shards.tolist(), end)
        position = end


class OrderOfRows:
    """The order as it was first written, of the counts of all rows."""

    def __init__(self, table: Table, seed: int, window_shards: int) -> None:
        self.counts = table.all_counts("captions")
        self.seed, self.window_shards, self.starts = seed, window_shards, table.shard_starts
        self.with_texts = np.flatnonzero(self.counts)
        ends = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])
        self.shard_sizes = np.diff(ends[self.starts])

    def epoch(self, epoch: int) -> list[Examples]:
        shards = permutation(random_bits(len(self.shard_sizes), self.seed, epoch))
        windows = range(0, len(shards), self.window_shards)
        return [
            self.window(epoch, number, shards[first : first + self.window_shards])
            for number, first in enumerate(windows)
            if self.shard_sizes[shards[first : first + self.window_shards]].sum()
        ]

    def window(self, epoch: int, window: int, shards: np.ndarray) -> Examples:
        starts, stops = self.starts[:-1], self.starts[1:]
        rows = np.concatenate([np.arange(starts[shard], stops[shard]) for shard in shards])
        rows = rows[self.counts[rows] > 0]
        counts = self.counts[rows]
        size = int(counts.sum())
        bits = random_bits(2 * size, self.seed, epoch, window + 1)
        shuffled = permutation(bits[:size])
        place = np.repeat(np.arange(len(rows)), counts)[shuffled]
        text_index = shuffled - (np.cumsum(counts) - counts)[place]
        others = rows
        if len(others) == 1:
            others = self.with_texts
            place = np.searchsorted(others, rows[place])
        if len(others) == 1:
            return Examples(others[place], text_index, np.full(size, -1))
        skip = 1 + (bits[size:] % np.uint64(len(others) - 1)).astype(np.int64)
        return Examples(others[place], text_index, others[(place + skip) % len(others)])


@settings(deadline=None)
@given(
    st.one_of(
        tables,
        # Windows of one sample with texts, whose distractors come of the whole split.
        st.lists(st.lists(st.sampled_from([0, 0, 0, 2]), min_size=1, max_size=4), min_size=2).map(
            lambda shards: Table(
                tuple(count for shard in shards for count in shard),
                tuple(int(start) for start in np.cumsum([0, *map(len, shards)])),
            )
        ),
    ).filter(lambda table: sum(table.row_counts) > 0),
    st.integers(0, 1 << 40),
    st.integers(1, 4),
)
def test_the_stream_is_that_of_an_order_that_knows_all_rows(
    table: Table, seed: int, window_shards: int
) -> None:
    order, reference = (
        Order(table, "captions", seed, window_shards),
        OrderOfRows(table, seed, window_shards),
    )
    for epoch in range(2):
        found = order.between(epoch * order.num_examples, (epoch + 1) * order.num_examples)
        for name in ("rows", "text_index", "distractors"):
            expected = [getattr(window, name) for window in reference.epoch(epoch)]
            assert getattr(found, name).tolist() == np.concatenate(expected).tolist()
