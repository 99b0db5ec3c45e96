"""Batches and caches keep their rows together."""

import torch

from pipeline.models.inputs import Cache
from tests.models.examples import batch


def test_a_blind_batch_has_the_text_and_no_regions() -> None:
    inputs = batch()
    blind = inputs.without_image()
    assert torch.equal(blind.tokens, inputs.tokens)
    assert blind.features.shape == (2, 0, inputs.features.shape[2])
    assert blind.boxes.shape == (2, 0, 4)
    assert blind.region_padding.shape == (2, 0)


def test_moving_a_batch_keeps_types_and_what_is_absent() -> None:
    moved = batch().to("meta")
    assert moved.tokens.device.type == "meta"
    assert moved.tokens.dtype == torch.int64
    assert moved.token_padding.dtype == torch.bool
    assert moved.masked_regions is None


def test_selecting_rows_of_a_cache_reorders_and_repeats_them() -> None:
    keys, values = torch.arange(3.0).view(3, 1, 1, 1), -torch.arange(3.0).view(3, 1, 1, 1)
    cache = Cache(((keys, values),), torch.eye(3, dtype=torch.bool), torch.tensor([4, 5, 6]))
    chosen = cache.select(torch.tensor([2, 0, 2, 1]))
    assert chosen.layers[0][0].flatten().tolist() == [2.0, 0.0, 2.0, 1.0]
    assert chosen.layers[0][1].flatten().tolist() == [-2.0, 0.0, -2.0, -1.0]
    assert chosen.padding.int().argmax(1).tolist() == [2, 0, 2, 1]
    assert chosen.num_tokens.tolist() == [6, 4, 6, 5]
