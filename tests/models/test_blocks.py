"""The blocks' own properties; that they compute what BERT does is tested with the families."""

import math

import torch

from pipeline.models import blocks
from tests.models.examples import assert_close

B, H, S, L, HEAD_WIDTH = 2, 3, 4, 5, 8


def random_heads() -> blocks.Heads:
    generator = torch.Generator().manual_seed(1)
    return blocks.Heads(
        torch.randn(B, H, S, HEAD_WIDTH, generator=generator),
        torch.randn(B, H, L, HEAD_WIDTH, generator=generator),
        torch.randn(B, H, L, HEAD_WIDTH, generator=generator),
    )


def test_attention_maps_are_the_weights_that_attention_reads_with() -> None:
    heads = random_heads()
    mask = torch.rand(B, 1, S, L, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[1, 0, 2] = False  # one query may see nothing
    read = blocks.attend(heads.query, heads.key, heads.value, mask, dropout=0.0)
    maps = blocks.attention_map(heads.query, heads.key, mask)
    assert_close((maps @ heads.value).transpose(1, 2).flatten(2), read)
    assert read[1, 2].abs().max() == 0.0
    assert maps.masked_select(~mask.expand_as(maps)).abs().max() == 0.0


def test_queries_keys_and_values_are_cut_from_one_projection_in_order() -> None:
    projected = torch.arange(B * S * 3 * 6.0).view(B, S, 18)
    query, key, value = blocks.split_heads(projected, num_heads=2)
    assert query.shape == (B, 2, S, 3)
    assert torch.equal(query[0, 1, 2], projected[0, 2, 3:6])
    assert torch.equal(key[1, 0, 3], projected[1, 3, 6:9])
    assert torch.equal(value[1, 1, 0], projected[1, 0, 15:18])


def test_fourier_features_of_a_box_double_in_frequency() -> None:
    box = torch.tensor([[[0.0, 0.25, 0.5, 1.0]]])
    features = blocks.fourier_boxes(box, 16)
    assert features.shape == (1, 1, 16)
    sines, cosines = features[0, 0].chunk(2)
    assert_close(sines[2:4], torch.tensor([math.sin(math.pi / 4), math.sin(math.pi / 2)]))
    assert_close(cosines[0:2], torch.ones(2))
    assert_close(cosines[6:8], torch.tensor([-1.0, 1.0]))


def test_new_models_have_berts_deviation_and_no_bias() -> None:
    torch.manual_seed(0)
    linear, embedding = torch.nn.Linear(70, 90), torch.nn.Embedding(80, 60)
    blocks.initialise(torch.nn.ModuleList([linear, embedding]), 0.02)
    assert linear.bias.abs().max() == 0.0
    assert abs(linear.weight.std().item() - 0.02) < 0.001
    assert abs(embedding.weight.std().item() - 0.02) < 0.001


def test_the_decoder_is_the_word_embedding() -> None:
    word = torch.nn.Embedding(9, 6)
    head = blocks.TokenHead(word)
    assert head.decoder.weight is word.weight
    assert head.forward(torch.randn(4, 6)).shape == (4, 9)
