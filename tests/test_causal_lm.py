"""Keys and values on their way into the library's cache and back."""

from typing import Any

import torch

from pipeline import causal_lm

GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 3, "n_positions": 20}


def test_a_cache_grows_without_changing_what_it_was_made_of() -> None:
    layers = [(torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)) for _ in range(3)]
    kept = [(keys.clone(), values.clone()) for keys, values in layers]
    cache = causal_lm.as_cache(layers)
    assert cache.get_seq_length() == 5
    one = torch.ones(2, 3, 1, 4)
    for index in range(3):
        cache.update(one, one, index)
    grown = causal_lm.from_cache(cache)
    for (keys, values), (old_keys, old_values), (new_keys, new_values) in zip(
        layers, kept, grown, strict=True
    ):
        assert torch.equal(keys, old_keys)
        assert torch.equal(values, old_values)
        assert torch.equal(new_keys, torch.cat([keys, one], dim=2))
        assert torch.equal(new_values, torch.cat([values, one], dim=2))


def test_the_caller_seeds_and_settings_are_those_of_the_config() -> None:
    models: list[Any] = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(causal_lm.build({**GPT2, "bos_token_id": None, "eos_token_id": None}, 11))
    first, same, other = (model.transformer.wte.weight for model in models)
    assert first.shape == (11, 8)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
