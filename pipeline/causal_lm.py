"""Causal language models of transformers, made from their `config.json` as plain modules.

Models know torch only; this is where the one family that is built around somebody else's language
model meets the library. Shapes: B sequences, H heads, L positions, d head width.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

# A head behind which the library still rescales logits; we call the head alone.
_RESCALING = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def build(document: Mapping[str, Any], vocab_size: int) -> "nn.Module":
    """Returns a newly initialised language model in float32. The caller seeds.

    `document` is as its `config.json`; where that says nothing of `vocab_size`, ours is taken, and
    no token begins or ends a text but those of our tokenizer, which the library need not know.
    Raises ModelError for a model that transformers does not have or that we cannot drive.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    unknown = {"bos_token_id": None, "eos_token_id": None}
    settings = {"vocab_size": vocab_size, **unknown, **document}
    model_type = settings.pop("model_type", None)
    if settings["vocab_size"] < vocab_size:
        raise ModelError(
            f"decoder.vocab_size={settings['vocab_size']} is less than the tokenizer's {vocab_size}"
        )
    try:
        config = AutoConfig.for_model(model_type, **settings)
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever the library makes of settings it does not check
        raise ModelError(
            f"decoder: transformers builds no causal language model of model_type {model_type!r} "
            f"from these settings: {error}"
        ) from error
    for key in _RESCALING:
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise ModelError(f"decoder.{key}={getattr(config, key)}: rescaled logits are not known")
    return model


def as_cache(layers: Sequence[tuple["Tensor", "Tensor"]]) -> Any:
    """Returns keys and values (B, H, L, d) of each layer as the library's cache.

    It refers to them and, as it grows, makes new ones: those given stay as they are.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for keys, values in layers:
        layer = DynamicLayer()
        layer.keys, layer.values = keys, values
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        cache.layers.append(layer)
    return cache


def from_cache(cache: Any) -> tuple[tuple["Tensor", "Tensor"], ...]:
    """Returns each layer's keys and values, (B, H, L, d) each."""
    return tuple((layer.keys, layer.values) for layer in cache.layers)
