"""Attention fusion against its one equation."""

import torch

from pipeline.models.attention_fusion import AttentionFusion
from tests.models.examples import assert_close, attention_fusion_config, batch, randomise, row


@torch.no_grad()
def test_words_read_regions_as_the_equation_says() -> None:
    model = randomise(AttentionFusion(attention_fusion_config()))
    inputs = batch()
    encoded = model.encode(inputs, attention=True)
    assert encoded.attention is not None
    for index in range(2):
        alone = row(inputs, index)
        text = model.encode_text(alone)[0]
        regions = model.encode_regions(alone)[0]
        weights = (text @ model.affinity.weight.T @ regions.T).softmax(-1)
        fused = model.fusion(torch.cat([text, weights @ regions], dim=-1))
        num_tokens, num_regions = weights.shape
        assert_close(encoded.text[index, :num_tokens], fused)
        found = encoded.attention[0][index, 0, :num_tokens, 6 : 6 + num_regions]
        assert_close(found, weights)


@torch.no_grad()
def test_the_map_has_text_reading_regions_only() -> None:
    model = randomise(AttentionFusion(attention_fusion_config()))
    maps = model.encode(batch(), attention=True).attention
    assert maps is not None
    assert [tuple(each.shape) for each in maps] == [(2, 1, 11, 11)]
    assert maps[0][:, :, 6:].abs().max() == 0.0
    assert maps[0][:, :, :, :6].abs().max() == 0.0
