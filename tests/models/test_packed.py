"""Packing: layers do the same to packed states as to padded ones, and nothing to padding."""

import pytest
import torch

from pipeline.models import blocks
from pipeline.models.packed import PackedLayout, full_mask, prefix_mask
from tests.models.examples import assert_close, randomise

B, S, D, N = 3, 5, 8, 8
PADDING = torch.arange(S) >= torch.tensor([3, 1, 4])[:, None]


def test_packing_keeps_what_is_held_in_order_and_laying_out_brings_it_back() -> None:
    layout = PackedLayout.of(PADDING)
    states = torch.randn(B, S, D)
    packed = layout.pack(states)
    assert torch.equal(packed, torch.cat([states[0, :3], states[1, :1], states[2, :4]]))
    padded = layout.pad(packed)
    assert torch.equal(padded[~PADDING], packed)
    assert padded[PADDING].abs().max() == 0.0


def test_without_padding_states_stay_as_they_are() -> None:
    layout = PackedLayout.of(torch.zeros(B, S, dtype=torch.bool))
    states = torch.randn(B, S, D)
    assert layout.pack(states) is states
    assert layout.pad(states) is states


@pytest.mark.parametrize("kind", ["full", "prefix"])
def test_a_layer_gives_packed_states_and_gradients_what_it_gives_padded_ones(kind: str) -> None:
    mask = prefix_mask(PADDING[:, :2], PADDING[:, 2:]) if kind == "prefix" else full_mask(PADDING)
    layer = randomise(blocks.TransformerLayer(D, 2, 12, dropout=0.0))
    states = torch.randn(B, S, D, generator=torch.Generator().manual_seed(1), requires_grad=True)
    seen = []
    for layout in (PackedLayout(mask, (B, S)), PackedLayout.of(PADDING, mask)):
        done, _ = layer(layout.pack(states), layout)
        out = layout.pad(done)[~PADDING]
        seen.append((out, *torch.autograd.grad(out.square().sum(), [states, *layer.parameters()])))
    assert done.shape == (N, D)
    for padded, packed in zip(*seen, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-4)
    assert_close(seen[0][0], seen[1][0])


def test_prefix_mask_lets_text_read_regions_but_not_the_other_way() -> None:
    token_padding = torch.tensor([[False, False, True]])
    region_padding = torch.tensor([[False, True]])
    visible = prefix_mask(token_padding, region_padding)[0, 0].int().tolist()
    assert visible == [
        [1, 0, 0, 1, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 1, 1, 0],  # padding sees itself, and nobody sees padding
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
