"""Late fusion: two vectors that meet only in the heads and in a dot product."""

from dataclasses import replace

import torch

from pipeline.models.late_fusion import LateFusion
from tests.models.examples import WIDTH, assert_close, batch, late_fusion_config, randomise


@torch.no_grad()
def test_text_and_image_halves_of_the_pooled_state_do_not_see_each_other() -> None:
    model = randomise(LateFusion(late_fusion_config()))
    inputs = batch()
    before = model.encode(inputs)
    other_text = model.encode(replace(inputs, tokens=inputs.tokens.flip(0)))
    other_image = model.encode(replace(inputs, features=inputs.features + 1.0))
    assert before.pooled.shape == (2, 2 * WIDTH)
    assert torch.equal(before.pooled[:, WIDTH:], other_text.pooled[:, WIDTH:])
    assert torch.equal(before.pooled[:, :WIDTH], other_image.pooled[:, :WIDTH])
    assert not torch.equal(before.pooled[:, :WIDTH], other_text.pooled[:, :WIDTH])
    assert not torch.equal(before.pooled[:, WIDTH:], other_image.pooled[:, WIDTH:])
    assert before.pooled.min() >= 0.0


@torch.no_grad()
def test_contrastive_vectors_have_length_one_and_similarity_is_scaled() -> None:
    model = LateFusion(late_fusion_config()).eval()
    inputs = batch((6, 4, 3), (5, 3, 2))
    text, image = model.contrastive(model.encode(inputs), inputs)
    assert_close(text.norm(dim=-1), torch.ones(3))
    assert_close(image.norm(dim=-1), torch.ones(3))
    logits = model.temperature(text @ image.T)
    assert_close(logits, text @ image.T / 0.07)
    model.temperature.log_scale.fill_(50.0)
    assert_close(model.temperature(torch.ones(1)), torch.full((1,), 100.0))


@torch.no_grad()
def test_contrastive_vectors_do_not_see_padding() -> None:
    model = randomise(LateFusion(late_fusion_config()))
    inputs = batch()
    noisy = replace(
        inputs,
        tokens=torch.where(inputs.token_padding, 3, inputs.tokens),
        features=inputs.features + 9.0 * inputs.region_padding.unsqueeze(-1),
    )
    for clean, changed in zip(
        model.contrastive(model.encode(inputs), inputs),
        model.contrastive(model.encode(noisy), noisy),
        strict=True,
    ):
        assert_close(clean, changed)
