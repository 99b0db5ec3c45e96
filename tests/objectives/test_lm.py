"""Captioning as a language model: what each place predicts."""

from typing import Any

import torch

from pipeline.objectives.base import IGNORED, Vocabulary
from pipeline.objectives.lm import LanguageModelling, LmConfig
from pipeline.objectives.stream import encode_texts, make_inputs
from tests.objectives.tiny import make_batch, make_model, make_tokenizer


def test_each_place_predicts_the_next_token_up_to_the_closing_one() -> None:
    tokenizer: Any = make_tokenizer()
    vocabulary = Vocabulary.of(tokenizer)
    encodings = encode_texts(["a red dog", "cat"], "captions", tokenizer, vocabulary, 24)
    objective = LanguageModelling(LmConfig())
    same, target = objective.prepare(make_batch(2), encodings, vocabulary, None)
    assert same is encodings
    a, red, dog, cat, sep = tokenizer.convert_tokens_to_ids(["a", "red", "dog", "cat", "[SEP]"])
    assert target.tolist() == [
        [a, red, dog, sep, IGNORED],
        [cat, sep, IGNORED, IGNORED, IGNORED],
    ]


def test_no_loss_looks_at_the_words_after_it() -> None:
    tokenizer: Any = make_tokenizer()
    vocabulary, model = Vocabulary.of(tokenizer), make_model(len(tokenizer))
    objective, batch = LanguageModelling(LmConfig()), make_batch(2)
    losses = []
    for last in ("dog", "cat"):
        encodings = encode_texts(
            [f"a red {last}", "a blue wall"], "captions", tokenizer, vocabulary, 24
        )
        _, target = objective.prepare(batch, encodings, vocabulary, None)
        target[:, 2:] = IGNORED  # the last word and the closing token
        inputs = make_inputs(encodings, batch.features)
        with torch.no_grad():
            encoded = model.encode(inputs, mask=objective.stream.mask)
            losses.append(objective.loss(model, encoded, inputs, target))
    assert torch.equal(losses[0], losses[1])
