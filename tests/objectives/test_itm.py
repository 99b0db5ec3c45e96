"""Image-text matching: which caption is shown, and which way round the label goes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from pipeline.objectives.base import Encodings
from pipeline.objectives.itm import ImageTextMatching, ItmConfig
from pipeline.objectives.stream import own_texts
from tests.objectives.tiny import make_batch, make_family, make_texts

NOTHING: Any = None


def shown(batch: Any, probability: float = 0.5) -> tuple[list[str], list[bool]]:
    objective = ImageTextMatching(ItmConfig(mismatch_probability=probability))
    drawn = objective.draw(batch)
    texts = objective.choose_texts(own_texts(batch, "captions"), drawn)
    encodings: Encodings = NOTHING
    _, target = objective.prepare(batch, encodings, NOTHING, drawn)
    return texts, target.tolist()


def test_the_target_says_whether_the_own_caption_is_shown() -> None:
    num_matched = 0
    for step in range(100):
        batch = make_batch(step=step)
        texts, matched = shown(batch)
        for i, (text, is_own) in enumerate(zip(texts, matched, strict=True)):
            assert (text == batch.texts[i].captions[0]) == is_own
            if not is_own:
                assert text in batch.distractors[i].captions
                assert text not in batch.texts[i].captions
        num_matched += sum(matched)
    assert num_matched / 600 == pytest.approx(0.5, abs=0.06)


def test_a_caption_that_the_image_has_as_well_is_no_mismatch() -> None:
    batch = make_batch()
    batch = replace(batch, distractors=batch.texts)
    assert all(all(shown(replace(batch, step=step))[1]) for step in range(20))


def test_an_image_without_captions_distracts_nobody() -> None:
    batch = replace(make_batch(2), distractors=[replace(make_texts(9), captions=())] * 2)
    assert all(all(shown(replace(batch, step=step))[1]) for step in range(20))


@pytest.mark.parametrize("match_index", [0, 1])
def test_the_label_follows_the_familys_polarity(match_index: int) -> None:
    logits = torch.tensor([[2.0, -1.0], [0.5, 0.25], [-3.0, 1.0]])
    model: Any = type(
        "Model", (), {"match_index": match_index, "match_logits": lambda _self, _: logits}
    )()
    target = torch.tensor([True, False, True])
    losses = ImageTextMatching(ItmConfig()).loss(model, NOTHING, NOTHING, target)
    labels = torch.tensor([match_index, 1 - match_index, match_index])
    assert torch.equal(losses, F.cross_entropy(logits, labels, reduction="none"))


def test_a_wrong_question_is_another_images() -> None:
    (objective,) = ItmConfig(texts=("questions",)).build()
    wrong = 0
    for step in range(20):
        batch = make_batch(step=step)
        drawn = objective.draw(batch)
        texts = objective.choose_texts(own_texts(batch, "questions"), drawn)
        _, target = objective.prepare(batch, NOTHING, NOTHING, drawn)
        for i, (text, matched) in enumerate(zip(texts, target.tolist(), strict=True)):
            source = batch.texts[i] if matched else batch.distractors[i]
            assert text == source.questions[0].question
            wrong += not matched
    assert wrong > 20


def test_the_polarity_of_each_family_is_the_published_one() -> None:
    polarity = {"visualbert": 1, "lxmert": 1, "vilbert": 0, "uniter": 1}
    for family, match_index in polarity.items():
        assert make_family(family, 30).match_index == match_index
