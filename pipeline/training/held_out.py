"""The held-out examples of an evaluation: each once, whatever the batch size and the ranks.

Beside training's steps, whose batches go through the same collators and the same module.
"""

import contextlib
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from pipeline.data.load.loader import Loader, share
from pipeline.data.sample import TextKind
from pipeline.errors import ConfigError
from pipeline.objectives.stream import CollatedBatch, StreamCollator
from pipeline.training.config import TrainingConfig
from pipeline.training.evaluation import held_out_losses
from pipeline.training.spec import RankContext


@dataclass(frozen=True)
class HeldOutPart:
    """What objectives that read the same batches see of the held-out examples."""

    loader: Loader
    collators: Sequence[StreamCollator]
    num_examples: int
    step: int  # the objectives that are due, and their random numbers, are those of this step
    weight: float  # of its loss in the sum of all

    def batches(
        self, config: TrainingConfig, rank: int, world_size: int
    ) -> Generator[CollatedBatch, None, None]:
        """Yields the rank's micro-batches."""
        read = self.loader.at(self._ranges(config, rank, world_size), self.step)
        with contextlib.closing(read):
            for batch in read:
                yield CollatedBatch({one.stream.name: one(batch) for one in self.collators})

    def num_passes(self, config: TrainingConfig, world_size: int) -> int:
        """Returns the micro-batches of the rank that has most."""
        return max(len(self._ranges(config, rank, world_size)) for rank in range(world_size))

    def _ranges(self, config: TrainingConfig, rank: int, world_size: int) -> list[range]:
        """Returns where among the examples each micro-batch of a rank begins and ends.

        Of a global batch that is needed whole every rank has a part.
        """
        if not any(one.needs_global_batch for one in self.collators):
            mine = share(self.num_examples, rank, world_size)
            starts = range(mine.start, mine.stop, config.micro_batch_size)
            return [range(at, min(at + config.micro_batch_size, mine.stop)) for at in starts]
        wanted = math.ceil(self.num_examples / config.global_batch_size)
        count = max(1, min(wanted, self.num_examples // world_size))
        wholes = [share(self.num_examples, number, count) for number in range(count)]
        shares = [share(len(whole), rank, world_size) for whole in wholes]
        return [whole[of.start : of.stop] for whole, of in zip(wholes, shares, strict=True)]


def held_out_parts(
    loaders: Mapping[TextKind, Loader],
    collators: Sequence[StreamCollator],
    seed: int,
    at_most: int | None,
) -> list[HeldOutPart]:
    """Returns what an evaluation reads: of each kind of text all examples or the first so many."""
    parts = []
    for step, weight in _turns(collators, seed).items():
        due = [one for one in collators if one.is_due(seed, step)]
        for kind, loader in loaders.items():
            count = min(loader.num_examples, at_most or loader.num_examples)
            for is_whole in (False, True):
                chosen = [
                    one
                    for one in due
                    if one.stream.kind == kind and one.needs_global_batch == is_whole
                ]
                if chosen:
                    parts.append(HeldOutPart(loader, chosen, count, step, weight))
    return parts


def evaluate(
    module: nn.Module,
    parts: Sequence[HeldOutPart],
    config: TrainingConfig,
    rank_context: RankContext,
) -> dict[str, float]:
    """Returns the mean loss of each objective over its examples, and their weighted sum, `loss`.

    Collective. Where a step trains one objective, the sum is the mean over steps. Raises
    ConfigError if there are fewer examples than ranks.
    """
    rank, world_size = rank_context.rank, rank_context.world_size
    total, means = 0.0, {}
    for part in parts:
        if part.num_examples < world_size:
            raise ConfigError(
                f"training.evaluation.every_steps: the held-out split has {part.num_examples} "
                f"{part.collators[0].stream.kind}, fewer than the {world_size} ranks; use fewer "
                "ranks, or another dataset.validation_split"
            )
        with contextlib.closing(part.batches(config, rank, world_size)) as batches:
            num_passes = part.num_passes(config, world_size)
            found = held_out_losses(module, batches, rank_context, num_passes)
        total += part.weight * found.pop("loss")
        means.update(found)
    return {"loss": total, **means}


def _turns(collators: Sequence[StreamCollator], seed: int) -> dict[int, float]:
    """Returns for each set of objectives that are trained together a step, and its share of all."""
    turns = {
        objective.turns.name: objective.turns
        for one in collators
        for objective in one.objectives
        if objective.turns is not None
    }
    shares = {}
    for name, turn in turns.items():
        step = 0
        while not turn.has(seed, step):
            step += 1
        shares[step] = turn.shares[name] / sum(turn.shares.values())
    return shares or {0: 1.0}
