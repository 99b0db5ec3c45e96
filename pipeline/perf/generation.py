"""Text generation with and without a cache, beside transformers' with the same weights.

All write the same number of tokens, as nothing ends a text, and the texts are compared.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pipeline import causal_lm
from pipeline.errors import ModelError
from pipeline.models import families
from pipeline.models.base import Decoder
from pipeline.models.generation import generate
from pipeline.models.inputs import Inputs
from pipeline.models.single_stream import SingleStream
from pipeline.models.visual_prefix import VisualPrefix, VisualPrefixConfig
from pipeline.models.visualbert import VisualBert, VisualBertConfig
from pipeline.perf import measure
from pipeline.perf.result import Comparison

NO_END = -1  # an id that no token has
Texts = list[list[int]]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Generation:
    """What everyone writes from, how much of it, and how often it is timed."""

    inputs: Inputs
    num_tokens: int
    rounds: int
    device: torch.device
    dtype: torch.dtype

    def cached_and_uncached(self, config: VisualBertConfig) -> Comparison:
        """Greedy captions by VisualBERT under the prefix mask."""
        model = self._ready(VisualBert(config))
        return self.compare(
            "VisualBERT",
            {
                "uncached": lambda: uncached(model, self.inputs, self.num_tokens),
                "cached": lambda: self._ours(model, self.inputs),
            },
        )

    def stream_and_transformers(self, config: VisualBertConfig) -> Comparison:
        """Greedy text by one BERT: VisualBERT without an image, BertLMHeadModel by `generate`."""
        import transformers

        document = families.FAMILIES["visualbert"].to_document(config, ())
        del document["model_type"]
        theirs = transformers.BertLMHeadModel(transformers.BertConfig(**document, is_decoder=True))
        ours = VisualBert(config)
        families.load_weights(ours, theirs.state_dict(), "bert")
        ours, theirs = self._ready(ours), self._ready(theirs)
        blind = self.inputs.without_image()
        return self.compare(
            "from text alone, BertLMHeadModel",
            {
                "transformers": lambda: self._theirs(
                    theirs, input_ids=blind.tokens, attention_mask=~blind.token_padding
                ),
                "ours": lambda: self._ours(ours, blind),
            },
        )

    def prefix_and_transformers(self, config: VisualPrefixConfig) -> Comparison:
        """Greedy captions by a GPT-2 that reads regions, and its own `generate` from there."""
        ours = VisualPrefix(config)
        theirs: Any = causal_lm.build(config.decoder, config.vocab_size)
        theirs.load_state_dict(ours.decoder.state_dict())
        ours, theirs = self._ready(ours), self._ready(theirs)

        def their_texts() -> Texts:
            embedded, padding = ours.embed(self.inputs)
            return self._theirs(theirs, inputs_embeds=embedded, attention_mask=~padding)

        return self.compare(
            "visual prefix of GPT-2",
            {"transformers": their_texts, "ours": lambda: self._ours(ours, self.inputs)},
        )

    def compare(self, title: str, writers: Mapping[str, Callable[[], Texts]]) -> Comparison:
        """Times writers of the same texts; raises ModelError if they differ in fp32."""
        title = f"generation of {self.num_tokens} tokens, {title}"
        first, second = (writer() for writer in writers.values())
        agree = sum(one == other for one, other in zip(first, second, strict=True))
        if agree < len(first) and self.dtype == torch.float32:
            raise ModelError(f"{title}: {agree} of {len(first)} texts agree, with the same weights")
        times = measure.measure(writers, self.rounds, self.device)
        tokens = sum(map(len, first))
        return Comparison.of(
            title,
            times,
            columns={"tokens/s": {name: f"{tokens / times.median(name):,.0f}" for name in writers}},
            notes=[f"{agree} of {len(first)} texts are the same"],
            figures={"texts": len(first), "texts_that_agree": agree},
        )

    def _ready(self, model: Model) -> Model:
        return model.to(self.device, self.dtype).eval()

    def _ours(self, model: Decoder, inputs: Inputs) -> Texts:
        return generate(model, inputs, eos=NO_END, max_new_tokens=self.num_tokens)

    @torch.inference_mode()
    def _theirs(self, model: Any, **given: Tensor) -> Texts:
        output = model.generate(
            **given,
            do_sample=False,
            max_new_tokens=self.num_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        written: Texts = output[:, -self.num_tokens :].tolist()
        return written


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
