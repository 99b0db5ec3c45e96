"""Both sides of a training step do the same work."""

from collections.abc import Callable

import pytest
import torch

from pipeline.errors import ModelError
from pipeline.objectives.base import IGNORED
from pipeline.perf import training_step
from pipeline.perf.model import lxmert_config, visualbert_config
from pipeline.perf.training_step import (
    MASKED_PER_TEXT,
    Opponent,
    TrainingBatch,
    equal_losses,
    loss_at_every_place,
    optimizer_of,
    our_loss,
    step_of,
)

CPU = torch.device("cpu")
LENGTHS, TOKENS, REGIONS = [6, 9, 4], 11, 5
OPPONENTS: dict[str, Callable[[], Opponent]] = {
    "visualbert": lambda: training_step.visualbert(visualbert_config("tiny")),
    "lxmert": lambda: training_step.lxmert(lxmert_config("tiny")),
}

every_opponent = pytest.mark.parametrize("name", OPPONENTS)


def draw(opponent: Opponent) -> TrainingBatch:
    config = opponent.ours.config
    return TrainingBatch.draw(config, LENGTHS, TOKENS, REGIONS, CPU, torch.float32)


def test_as_many_words_are_hidden_in_each_text_and_none_in_its_padding() -> None:
    batch = draw(OPPONENTS["visualbert"]())
    hidden = batch.target != IGNORED
    assert hidden.sum(1).tolist() == [MASKED_PER_TEXT] * 3
    assert not (hidden & batch.inputs.token_padding).any()
    assert not hidden[:, 0].any()
    assert (~batch.inputs.token_padding).sum(1).tolist() == LENGTHS


@every_opponent
def test_losses_with_the_same_weights_are_equal(name: str) -> None:
    opponent = OPPONENTS[name]()
    padded = draw(opponent)
    theirs, ours = equal_losses(opponent, padded, padded.cut(9), torch.float32)
    assert theirs == pytest.approx(ours, abs=1e-5)
    regions_too = name == "visualbert"
    with torch.no_grad():
        everywhere = float(loss_at_every_place(opponent.ours, regions_too)(padded))
    assert everywhere == pytest.approx(ours, abs=1e-5)


@every_opponent
def test_other_weights_are_noticed(name: str) -> None:
    opponent = OPPONENTS[name]()
    padded = draw(opponent)
    with torch.no_grad():
        for parameter in opponent.ours.parameters():
            parameter.mul_(1.5)
    with pytest.raises(ModelError, match="same weights"):
        equal_losses(opponent, padded, padded.cut(9), torch.float32)


@every_opponent
def test_a_step_trains_either_model_alike(name: str) -> None:
    opponent = OPPONENTS[name]()
    batch = draw(opponent)
    losses = {}
    for side, module, loss_of in (
        ("ours", opponent.ours, our_loss(opponent.ours)),
        ("theirs", opponent.theirs, opponent.their_loss),
    ):
        step = step_of(optimizer_of(module.eval()), loss_of, batch)
        for _ in range(3):
            step()
        losses[side] = float(loss_of(batch).detach())
    # transformers' LXMERT never trains its segment 0 nor position 0 (padding_idx=0 in all tables)
    tolerance = 1e-2 if name == "lxmert" else 1e-4
    assert losses["ours"] == pytest.approx(losses["theirs"], abs=tolerance)
