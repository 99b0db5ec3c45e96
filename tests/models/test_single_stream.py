"""Early fusion: who sees whom in the one sequence of text and regions."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.errors import ModelError
from tests.models.examples import (
    WIDTH,
    WORDS,
    assert_close,
    batch,
    row,
    visualbert,
)


@torch.no_grad()
@pytest.mark.parametrize("mask", ["full", "prefix"])
def test_padding_changes_nothing(mask: Any) -> None:
    model = visualbert(position_fourier=8)
    inputs = batch((6, 4, 3), (2, 5, 3))
    together = model.encode(inputs, mask=mask)
    answers = model.answer_logits(together, inputs)
    for index in range(3):
        alone_inputs = row(inputs, index)
        alone = model.encode(alone_inputs, mask=mask)
        tokens, regions = ~inputs.token_padding[index], ~inputs.region_padding[index]
        assert_close(together.text[index, tokens], alone.text[0])
        assert_close(together.regions[index, regions], alone.regions[0])
        assert_close(together.pooled[index], alone.pooled[0])
        assert_close(answers[index], model.answer_logits(alone, alone_inputs)[0])


@torch.no_grad()
def test_under_the_prefix_mask_nothing_sees_a_later_token() -> None:
    model = visualbert()
    inputs = batch((6, 6), (5, 5))
    before = model.encode(inputs, mask="prefix")
    changed = inputs.tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % WORDS
    after = model.encode(replace(inputs, tokens=changed), mask="prefix")
    torch.testing.assert_close(after.text[:, :3], before.text[:, :3], rtol=0, atol=0)
    torch.testing.assert_close(after.regions, before.regions, rtol=0, atol=0)
    assert (after.text[:, 3:] - before.text[:, 3:]).abs().amax(-1).min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("mask", ["full", "prefix"])
def test_asking_for_attention_maps_does_not_change_the_states(mask: Any) -> None:
    model = visualbert()
    inputs = batch()
    asked = model.encode(inputs, mask=mask, attention=True)
    assert torch.equal(asked.text, model.encode(inputs, mask=mask).text)
    assert asked.attention is not None
    assert [tuple(each.shape) for each in asked.attention] == [(2, 3, 11, 11)] * 2


@torch.no_grad()
def test_blind_inputs_leave_the_text_alone() -> None:
    model = visualbert()
    inputs = batch()
    blind = model.encode(inputs.without_image())
    assert blind.regions.shape == (2, 0, WIDTH)
    none_visible = replace(inputs, region_padding=torch.ones_like(inputs.region_padding))
    assert_close(model.encode(none_visible).pooled, blind.pooled)


def test_heads_and_texts_that_are_not_there_are_named() -> None:
    model = visualbert(num_answers=0)
    inputs = batch()
    with pytest.raises(ModelError, match="num_answers=0"):
        model.answer_logits(model.encode(inputs), inputs)
    with pytest.raises(ModelError, match="max_positions=17"):
        model.encode(batch((18, 4)))
