"""Question answering in pretraining: which answer is asked for."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.sample import Question, Texts
from pipeline.errors import ConfigError
from pipeline.objectives.base import IGNORED, Vocabulary
from pipeline.objectives.qa import QaConfig, QuestionAnswering
from tests.objectives.tiny import make_batch, with_texts

NOTHING: Any = None
VOCABULARY = Vocabulary(0, 2, 3, 4, np.arange(5, 9), {"yes": 0, "no": 1, "red": 2})


def drawn(*given: str, step: int = 0) -> int:
    batch = with_texts(
        make_batch(1, step=step), [Texts(1, questions=(Question(1, "is it?", given),))]
    )
    _, target = QuestionAnswering(QaConfig()).prepare(batch, NOTHING, VOCABULARY, None)
    return int(target[0])


def test_an_answer_is_drawn_in_proportion_to_its_soft_score() -> None:
    given = ("no",) * 2 + ("red",) * 3 + ("unknown",) * 5
    counts = Counter(drawn(*given, step=step) for step in range(1000))
    assert set(counts) == {1, 2}
    assert counts[1] / 1000 == pytest.approx(0.6 / 1.5, abs=0.04)


def test_a_question_without_a_known_answer_costs_nothing() -> None:
    assert drawn("unknown") == IGNORED
    model: Any = type("Model", (), {"answer_logits": lambda *_: torch.randn(2, 3)})()
    losses = QuestionAnswering(QaConfig()).loss(model, NOTHING, NOTHING, torch.tensor([IGNORED, 1]))
    assert losses[0] == 0
    assert losses[1] > 0


def test_it_is_refused_without_answers() -> None:
    with pytest.raises(ConfigError, match=r"objectives\.qa"):
        QuestionAnswering(QaConfig()).check(NOTHING, ())


def test_only_matched_pairs_count() -> None:
    assert QuestionAnswering.matched_only
