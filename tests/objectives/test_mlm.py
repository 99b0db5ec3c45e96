"""Masked language modelling: what is hidden, and how often."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.objectives.base import IGNORED, Encodings, Vocabulary
from pipeline.objectives.mlm import MaskedLanguageModelling, MlmConfig
from tests.objectives.tiny import make_batch, make_model, make_tokenizer

PAD, CLS, SEP, MASK = 0, 2, 3, 4
PIECES = np.arange(10, 1010)
VOCABULARY = Vocabulary(pad=PAD, cls=CLS, sep=SEP, mask=MASK, pieces=PIECES, answers={})


def make_encodings(lengths: list[int], width: int) -> Encodings:
    places, ends = np.arange(width), np.array(lengths)[:, None]
    is_word = (places >= 1) & (places <= ends)
    tokens = np.where(is_word, 500 + places, np.where(places == 0, CLS, PAD))
    tokens = np.where(places == ends + 1, SEP, tokens)
    return Encodings(tokens, places > ends + 1, is_word)


def corrupt(lengths: list[int], step: int = 0) -> tuple[Encodings, Encodings, torch.Tensor]:
    before = make_encodings(lengths, max(lengths) + 2)
    batch = replace(make_batch(len(lengths), step=step), seed=3)
    after, target = MaskedLanguageModelling(MlmConfig()).prepare(batch, before, VOCABULARY, None)
    return before, after, target


def test_the_target_is_the_true_piece_where_chosen_and_nothing_elsewhere() -> None:
    before, after, target = corrupt([3, 9, 30])
    chosen = (target != IGNORED).numpy()
    assert (target.numpy()[chosen] == before.tokens[chosen]).all()
    assert (after.tokens[~chosen] == before.tokens[~chosen]).all()
    assert not chosen[~before.is_word].any()


def test_fifteen_percent_are_chosen_and_eighty_ten_ten_become_mask_random_same() -> None:
    num_chosen = num_masked = num_same = num_random = 0
    for step in range(60):
        before, after, target = corrupt([400, 401, 402], step)
        chosen = (target != IGNORED).numpy()
        now, then = after.tokens[chosen], before.tokens[chosen]
        num_chosen += len(now)
        num_masked += int((now == MASK).sum())
        num_same += int((now == then).sum())
        num_random += int(((now != MASK) & (now != then)).sum())
        assert np.isin(now[now != MASK], PIECES).all()
    assert num_chosen / (60 * 1203) == pytest.approx(0.15, abs=0.01)
    assert num_masked / num_chosen == pytest.approx(0.8, abs=0.02)
    assert num_same / num_chosen == pytest.approx(0.1, abs=0.02)
    assert num_random / num_chosen == pytest.approx(0.1, abs=0.02)


def test_at_least_one_piece_of_a_text_is_chosen() -> None:
    for step in range(50):
        _, _, target = corrupt([1, 2, 3], step)
        assert ((target != IGNORED).sum(1) >= 1).all()


def test_the_choice_does_not_depend_on_the_padding() -> None:
    _, alone, _ = corrupt([6])
    _, beside, _ = corrupt([6, 40])
    assert (beside.tokens[0, :8] == alone.tokens[0]).all()


def test_an_empty_text_costs_nothing() -> None:
    tokenizer: Any = make_tokenizer()
    model = make_model(len(tokenizer))
    target = torch.full((2, 4), IGNORED)
    target[1, 2] = 7
    encoded: Any = type("Encoded", (), {"text": torch.randn(2, 4, 16)})
    objective = MaskedLanguageModelling(MlmConfig())
    losses = objective.loss(model, encoded, None, target)  # type: ignore[arg-type]
    assert losses.shape == (2,)
    assert losses[0] == 0
    assert losses[1] > 0


def test_whole_words_are_hidden_together_and_the_share_of_words_is_the_same() -> None:
    objective = MaskedLanguageModelling(MlmConfig(whole_words=True))
    num_words = num_chosen = 0
    for step in range(60):
        before = make_encodings([300, 299], 302)
        words = np.where(before.is_word, np.arange(302) // 3, 0)  # words of three pieces
        batch = replace(make_batch(2, step=step), seed=3)
        after, target = objective.prepare(batch, replace(before, words=words), VOCABULARY, None)
        for i in range(2):
            chosen, of_text = (target[i] != IGNORED).numpy(), before.is_word[i]
            hidden = set(words[i, chosen].tolist())
            assert hidden.isdisjoint(words[i, of_text & ~chosen].tolist())
            num_words += len(set(words[i, of_text].tolist()))
            num_chosen += len(hidden)
        assert after.words is words
    assert num_chosen / num_words == pytest.approx(0.15, abs=0.01)


def test_questions_are_a_stream_of_their_own() -> None:
    both = MlmConfig(texts=("captions", "questions", "captions")).build()
    assert [(one.name, one.stream.name) for one in both] == [
        ("mlm", "captions-full"),
        ("mlm-questions", "questions-full"),
    ]
