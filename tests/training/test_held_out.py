"""How held-out examples are cut and weighed; what is found on real ones, see test_assembly."""

from dataclasses import dataclass, replace
from itertools import chain, product
from typing import Any

import pytest
from torch import nn

from pipeline.errors import ConfigError
from pipeline.objectives.base import Stream
from pipeline.objectives.turns import Turns
from pipeline.training.config import TrainingConfig
from pipeline.training.held_out import HeldOutPart, evaluate, held_out_parts
from pipeline.training.spec import RankContext

CAPTIONS = Stream("captions", "full")


@dataclass(frozen=True)
class Collator:
    """What is asked of a collator before it sees a batch."""

    stream: Stream = CAPTIONS
    needs_global_batch: bool = False
    objectives: Any = ()

    def is_due(self, seed: int, step: int) -> bool:
        return all(one.turns.has(seed, step) for one in self.objectives)


@dataclass(frozen=True)
class Turning:
    turns: Turns


@dataclass(frozen=True)
class Examples:
    num_examples: int

    def at(self, ranges: list[range], _: int) -> Any:
        yield from ranges


def config(global_batch_size: int, micro_batch_size: int) -> TrainingConfig:
    return TrainingConfig(
        steps=1, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size
    )


def part(num_examples: int, whole: bool = False) -> HeldOutPart:
    collators: Any = [Collator(needs_global_batch=whole)]
    loader: Any = Examples(num_examples)
    return HeldOutPart(loader, collators, num_examples, 0, 1.0)


def ranges(part: HeldOutPart, training: TrainingConfig, world_size: int) -> list[list[range]]:
    return [part._ranges(training, rank, world_size) for rank in range(world_size)]


def test_every_example_is_in_one_micro_batch_of_one_rank() -> None:
    for count, world_size, micro in product((7, 8, 23, 24), (1, 2, 3, 5), (1, 3, 4, 50)):
        training = config(60, micro)
        ranks = ranges(part(count), training, world_size)
        assert list(chain.from_iterable(chain.from_iterable(ranks))) == list(range(count))
        assert max(len(batch) for batch in chain.from_iterable(ranks)) <= micro
        assert part(count).num_passes(training, world_size) == max(map(len, ranks))


def test_every_rank_has_a_part_of_each_global_batch_that_is_needed_whole() -> None:
    for count, world_size, micro in product((5, 8, 23, 24), (1, 2, 5), (1, 3, 4)):
        training = config(world_size * micro, micro)
        ranks = ranges(part(count, whole=True), training, world_size)
        assert len({len(batches) for batches in ranks}) == 1
        assert sorted(chain.from_iterable(chain.from_iterable(ranks))) == list(range(count))
        assert all(len(batch) > 0 for batch in chain.from_iterable(ranks))
        sizes = [sum(map(len, batches)) for batches in zip(*ranks, strict=True)]
        assert max(sizes) - min(sizes) <= 1


def test_objectives_that_take_turns_count_by_their_shares() -> None:
    shares = {"mlm": 1.0, "itm": 3.0}
    first: Any = Collator(objectives=[Turning(Turns("mlm", shares))])
    second: Any = Collator(Stream("questions", "full"), objectives=[Turning(Turns("itm", shares))])
    loaders: Any = {"captions": Examples(9), "questions": Examples(4)}
    parts = held_out_parts(loaders, [first, second], seed=2, at_most=6)
    found = {one.collators[0].stream.kind: (one.num_examples, one.weight) for one in parts}
    assert found == {"captions": (6, 0.25), "questions": (4, 0.75)}
    for one in parts:
        assert all(collate.is_due(2, one.step) for collate in one.collators)
    both: Any = [replace(one, objectives=()) for one in (first, second)]
    assert [one.weight for one in held_out_parts(loaders, both, 2, None)] == [1.0, 1.0]


def test_fewer_examples_than_ranks_are_refused() -> None:
    here = RankContext(rank=0, world_size=3, local_rank=0, device="cpu")
    with pytest.raises(ConfigError, match="has 2 captions, fewer than the 3 ranks"):
        evaluate(nn.Linear(1, 1), [part(2)], config(6, 2), here)
