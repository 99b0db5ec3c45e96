"""Answering: soft scores, and the sum over answers."""

from typing import Any

import pytest
import torch

from pipeline.data.sample import Question, Texts
from pipeline.objectives.answer import AnswerConfig, Answering
from pipeline.objectives.base import Vocabulary
from tests.objectives.tiny import make_batch, with_texts

NOTHING: Any = None


def test_the_soft_score_is_the_official_accuracy_of_each_known_answer() -> None:
    answers = ("red",) * 1 + ("blue",) * 2 + ("green",) * 3 + ("grey",) * 4
    texts = [
        Texts(1, questions=(Question(1, "what colour?", answers),)),
        Texts(2, questions=(Question(2, "what?", ("red",)),)),
    ]
    vocabulary = Vocabulary.of(
        type("T", (), {"all_special_ids": [0], "__len__": lambda _: 5} | special_ids())(),
        ["grey", "red", "green", "yes", "blue"],
    )
    batch = with_texts(make_batch(2), texts)
    _, target = Answering(AnswerConfig()).prepare(batch, NOTHING, vocabulary, None)
    assert target.tolist() == [
        pytest.approx([1.0, 0.3, 0.9, 0.0, 0.6]),
        pytest.approx([0.0, 1.0, 0.0, 0.0, 0.0]),
    ]


def test_the_loss_is_summed_over_answers_not_averaged() -> None:
    model: Any = type("Model", (), {"answer_logits": lambda *_: torch.zeros(2, 7)})()
    losses = Answering(AnswerConfig()).loss(model, NOTHING, NOTHING, torch.full((2, 7), 0.3))
    assert losses.tolist() == pytest.approx([7 * 0.693147, 7 * 0.693147], abs=1e-4)


def special_ids() -> dict[str, int]:
    return {f"{name}_token_id": 0 for name in ("pad", "cls", "sep", "mask")}
