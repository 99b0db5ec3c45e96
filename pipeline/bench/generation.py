"""Writing text: with and without a cache, ours and transformers' `generate`, with the same weights.

All write the same number of tokens, as nothing ends a text, and the texts are compared.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from pipeline import causal_lm
from pipeline.bench import measure
from pipeline.bench.result import Comparison
from pipeline.errors import ModelError
from pipeline.models import families
from pipeline.models.generation import generate
from pipeline.models.inputs import Inputs
from pipeline.models.single_stream import SingleStream
from pipeline.models.visual_prefix import VisualPrefix, VisualPrefixConfig
from pipeline.models.visualbert import VisualBert, VisualBertConfig

NO_END = -1  # an id that no token has
Texts = list[list[int]]


def cached_and_uncached(
    config: VisualBertConfig,
    inputs: Inputs,
    num_tokens: int,
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Comparison:
    """Greedy captions by VisualBERT under the prefix mask."""
    model = VisualBert(config).to(device, dtype).eval()
    return _compare(
        f"generation of {num_tokens} tokens, VisualBERT",
        {
            "uncached": lambda: uncached(model, inputs, num_tokens),
            "cached": lambda: generate(model, inputs, eos=NO_END, max_new_tokens=num_tokens),
        },
        rounds,
        device,
        dtype,
    )


def stream_and_transformers(
    config: VisualBertConfig,
    inputs: Inputs,
    num_tokens: int,
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Comparison:
    """Greedy text by one BERT: VisualBERT without an image, and BertLMHeadModel's `generate`."""
    import transformers

    document = families.FAMILIES["visualbert"].to_document(config, ())
    del document["model_type"]
    theirs: Any = transformers.BertLMHeadModel(transformers.BertConfig(**document, is_decoder=True))
    ours = VisualBert(config)
    families.load_weights(ours, theirs.state_dict(), "bert")
    ours, theirs = ours.to(device, dtype).eval(), theirs.to(device, dtype).eval()
    blind = inputs.without_image()
    return _compare(
        f"generation of {num_tokens} tokens from text alone, BertLMHeadModel",
        {
            "transformers": lambda: _their_texts(
                theirs, num_tokens, input_ids=blind.tokens, attention_mask=~blind.token_padding
            ),
            "ours": lambda: generate(ours, blind, eos=NO_END, max_new_tokens=num_tokens),
        },
        rounds,
        device,
        dtype,
    )


def prefix_and_transformers(
    config: VisualPrefixConfig,
    inputs: Inputs,
    num_tokens: int,
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Comparison:
    """Greedy captions by a GPT-2 that reads regions, and its own `generate` from there."""
    ours = VisualPrefix(config)
    theirs: Any = causal_lm.build(config.decoder, config.vocab_size)
    theirs.load_state_dict(ours.decoder.state_dict())
    ours, theirs = ours.to(device, dtype).eval(), theirs.to(device, dtype).eval()

    def their_texts() -> Texts:
        embedded, padding = ours.embed(inputs)
        return _their_texts(theirs, num_tokens, inputs_embeds=embedded, attention_mask=~padding)

    return _compare(
        f"generation of {num_tokens} tokens, visual prefix of GPT-2",
        {
            "transformers": their_texts,
            "ours": lambda: generate(ours, inputs, eos=NO_END, max_new_tokens=num_tokens),
        },
        rounds,
        device,
        dtype,
    )


@torch.inference_mode()
def uncached(model: SingleStream, inputs: Inputs, num_tokens: int) -> Texts:
    """Reads image and text anew for each greedy token."""
    begun = inputs.tokens.shape[1]
    for _ in range(num_tokens):
        states = model.encode(inputs, mask="prefix").text[:, -1]
        chosen = model.token_logits(states).argmax(-1, keepdim=True)
        tokens = torch.cat([inputs.tokens, chosen], dim=1)
        padding = torch.zeros_like(tokens, dtype=torch.bool)
        inputs = replace(inputs, tokens=tokens, token_padding=padding)
    written: Texts = inputs.tokens[:, begun:].tolist()
    return written


@torch.inference_mode()
def _their_texts(model: Any, num_tokens: int, **given: Tensor) -> Texts:
    output = model.generate(
        **given,
        do_sample=False,
        max_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    written: Texts = output[:, -num_tokens:].tolist()
    return written


def _compare(
    title: str,
    writers: dict[str, Callable[[], Texts]],
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Comparison:
    """Times writers of the same texts; raises ModelError if they differ in fp32."""
    first, second = (writer() for writer in writers.values())
    agree = sum(one == other for one, other in zip(first, second, strict=True))
    if agree < len(first) and dtype == torch.float32:
        raise ModelError(f"{title}: {agree} of {len(first)} texts agree, with the same weights")
    times = measure.measure(cast(dict[str, measure.Contestant], writers), rounds, device)
    tokens = sum(map(len, first))
    columns = {
        "tokens/s": {name: f"{tokens / times.median(name):,.0f}" for name in writers},
    }
    return Comparison.of(
        title,
        times,
        columns=columns,
        notes=[f"{agree} of {len(first)} texts are the same"],
        figures={"texts": len(first), "texts_that_agree": agree},
    )
