"""Visual prefix: a causal language model that reads projected regions as if they were words."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pipeline import causal_lm
from pipeline.errors import ModelError
from pipeline.models import blocks
from pipeline.models.base import MaskKind, ModelConfig, Size, VisionLanguageModel
from pipeline.models.inputs import Cache, Encoded, Inputs
from pipeline.models.layouts import Layout
from pipeline.models.packed import full_mask
from pipeline.models.visual_tokens import Projection, Resampler

Pair = tuple[Tensor, Tensor]  # keys and values


class VisualPrefixConfig(ModelConfig):
    """A language model and how it reads images.

    `width` must be the decoder's hidden size. `num_heads`, `intermediate_size` and `dropout`
    are those of what stands between image and language model, which has its own. `max_positions`
    is the longest text; the language model needs room for it and the visual tokens.
    """

    decoder: dict[str, Any] = Field(
        description="the language model's own `config.json`, as transformers writes it, with "
        "its `model_type`"
    )
    projection: Literal["linear", "mlp", "resampler"] = Field(
        default="linear", description="what makes visual tokens of features"
    )
    num_queries: Size = Field(default=32, description="of a resampler: its visual tokens")
    resampler_layers: Size = Field(default=2, description="of a resampler: its layers")
    position_fourier: int = Field(
        default=32, ge=0, multiple_of=8, description="box features beside each region's own"
    )
    prefix: bool = Field(default=True, description="whether visual tokens stand before the text")
    cross_every: int = Field(
        default=0, ge=0, description="gated cross-attention before each n-th block; 0: none"
    )
    train_decoder: bool = Field(
        default=True, description="whether the language model learns; false: only what is ours does"
    )

    @model_validator(mode="after")
    def _reads_the_image(self) -> "VisualPrefixConfig":
        if "model_type" not in self.decoder:
            raise ValueError("decoder.model_type is missing; give the decoder's config.json")
        if not self.prefix and not self.cross_every:
            raise ValueError("prefix=false with cross_every=0: the image would not be read")
        return self


class TanhGate(nn.Module):
    """A learned factor between -1 and 1 that begins at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.openness = nn.Parameter(torch.zeros(1))

    def forward(self, states: Tensor) -> Tensor:
        """Scales states of any shape."""
        return states * self.openness.tanh()


class GatedCrossAttention(nn.Module):
    """Text reads visual tokens between two blocks of a language model (Flamingo, 2204.14198, 3.2).

    Both of its additions begin at 0, so that the language model begins as it was. Unlike the paper
    it has dropout.
    """

    def __init__(self, width: int, num_heads: int, intermediate_size: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.visual_norm = nn.LayerNorm(width, eps=blocks.LAYER_NORM_EPS)
        self.key_value = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width, eps=blocks.LAYER_NORM_EPS)
        self.query = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.gate = TanhGate()
        self.feed_forward_norm = nn.LayerNorm(width, eps=blocks.LAYER_NORM_EPS)
        self.up = nn.Linear(width, intermediate_size)
        self.down = nn.Linear(intermediate_size, width)
        self.feed_forward_gate = TanhGate()

    def read(self, visual: Tensor) -> Pair:
        """Returns keys and values (B, H, Q, d) of visual tokens (B, Q, D)."""
        key, value = self.key_value(self.visual_norm(visual)).chunk(2, dim=-1)
        return self._heads(key), self._heads(value)

    def forward(self, states: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Maps states (B, S, D) to the same shape; mask (B, 1, 1, Q) says what may be read."""
        dropout = self.dropout if self.training else 0.0
        read = blocks.attend(self._heads(self.query(self.norm(states))), key, value, mask, dropout)
        states = states + self.gate(F.dropout(self.out(read), self.dropout, self.training))
        added = self.down(F.gelu(self.up(self.feed_forward_norm(states))))
        gated: Tensor = self.feed_forward_gate(F.dropout(added, self.dropout, self.training))
        return states + gated

    def attention_map(self, states: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        """Returns the weights (B, H, S, Q) with which `forward` reads."""
        return blocks.attention_map(self._heads(self.query(self.norm(states))), key, mask)

    def _heads(self, projected: Tensor) -> Tensor:
        head_width = projected.shape[-1] // self.num_heads
        return projected.view(*projected.shape[:2], self.num_heads, head_width).transpose(1, 2)


@dataclass(frozen=True)
class PrefixCache(Cache):
    """Also what the gated layers read of the image: B sequences, Q visual tokens."""

    seen: tuple[Pair, ...]  # per gated layer, (B, H, Q, d) each
    seen_padding: Tensor  # (B, Q) bool

    def select(self, rows: Tensor) -> "PrefixCache":
        own = super().select(rows)
        return PrefixCache(
            own.layers,
            own.padding,
            own.num_tokens,
            seen=tuple((keys[rows], values[rows]) for keys, values in self.seen),
            seen_padding=self.seen_padding[rows],
        )


@dataclass
class Reading:
    """What one pass through the language model lets its gated layers see."""

    seen: Sequence[Pair]
    mask: Tensor  # (B, 1, 1, Q)
    maps: list[Tensor] | None = None  # filled by gated layers, (B, H, S, Q) each


class VisualPrefix(VisionLanguageModel):
    """Any causal language model of transformers, given projected regions to read.

    Visual tokens stand before the text (Frozen, arXiv:2106.13884), are read by gated
    cross-attention between the blocks (Flamingo, arXiv:2204.14198), or both. Everything is read
    from left to right, regions too, under either mask; a text is summarised by its last token. With
    a resampler, `Encoded.regions` are its queries, and there are no attention maps of regions.
    """

    match_index = 1
    masks = ("full", "prefix")
    config: VisualPrefixConfig

    def __init__(self, config: VisualPrefixConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = causal_lm.build(config.decoder, config.vocab_size)
        if self._language.config.hidden_size != config.width:
            raise ModelError(
                f"width={config.width}, but the decoder's hidden size is "
                f"{self._language.config.hidden_size}; set width to that"
            )
        self.decoder.requires_grad_(config.train_decoder)
        self.visual = _projection(config)
        gated = [config.cross_every > 0 and i % config.cross_every == 0 for i in range(self._depth)]
        self.gates = nn.ModuleList(
            GatedCrossAttention(
                config.width, config.num_heads, config.intermediate_size, config.dropout
            )
            for _ in range(sum(gated))
        )
        self.match_head = nn.Linear(config.width, 2)
        if config.num_answers:
            self.answer_head = blocks.AnswerHead(config.width, config.num_answers)
        for ours in self.children():
            if ours is not self.decoder:
                blocks.initialise(ours, config.initializer_range)
        self._reading: Reading | None = None
        for index, block in enumerate(_blocks(self.decoder, self._depth)):
            # The library has no place for a layer between two blocks. Taking over a block's
            # forward, rather than wrapping the block, leaves the names of its weights as they are.
            gate = sum(gated[:index]) if gated[index] else None
            vars(block)["forward"] = partial(self._run_block, block.forward, gate)

    @property
    def _language(self) -> Any:
        """The decoder by its type in the library, of which models know nothing."""
        return self.decoder

    @property
    def _depth(self) -> int:
        depth: int = self._language.config.num_hidden_layers
        return depth

    def encode(
        self, inputs: Inputs, *, mask: MaskKind = "full", attention: bool = False
    ) -> Encoded:
        self.require_mask(mask)
        self.positions(inputs.tokens)
        visual, unseen = self._read_image(inputs)
        embedded, padding = self._sequence(inputs, visual, unseen)
        reading = self._gated_reading(visual, unseen)
        maps = None
        if attention and self.config.projection != "resampler":
            states, maps = self._run_with_maps(embedded, padding, reading)
        else:
            states = self._run(embedded, padding, reading).last_hidden_state
            maps = () if attention else None
        regions, text = states.tensor_split([states.shape[1] - inputs.tokens.shape[1]], dim=1)
        pooled = blocks.states_from_end(text, inputs.token_padding, back=1)
        return Encoded(text, regions if self.config.prefix else visual, pooled, maps)

    def token_logits(self, states: Tensor) -> Tensor:
        logits: Tensor = self._language.get_output_embeddings()(states)
        return logits

    def match_logits(self, encoded: Encoded) -> Tensor:
        logits: Tensor = self.match_head(encoded.pooled)
        return logits

    def answer_logits(self, encoded: Encoded, inputs: Inputs) -> Tensor:  # noqa: ARG002
        """Reads answers from the last token."""
        self.require_answers()
        logits: Tensor = self.answer_head(encoded.pooled)
        return logits

    def start(self, inputs: Inputs) -> tuple[Tensor, PrefixCache]:
        """Reads image and prefix tokens, and keeps their keys and values.

        Returns logits (B, V) of the token after each row's last real one.
        """
        visual, unseen = self._read_image(inputs)
        embedded, padding = self._sequence(inputs, visual, unseen)
        reading = self._gated_reading(visual, unseen)
        output = self._run(embedded, padding, reading, past=())
        text = output.last_hidden_state[:, embedded.shape[1] - inputs.tokens.shape[1] :]
        last = blocks.states_from_end(text, inputs.token_padding, back=1)
        return self.token_logits(last), PrefixCache(
            causal_lm.from_cache(output.past_key_values),
            padding,
            (~padding).sum(1),
            seen=tuple(reading.seen),
            seen_padding=unseen,
        )

    def extend(self, tokens: Tensor, cache: Cache) -> tuple[Tensor, PrefixCache]:
        """Reads one more token per row, (B,); returns the next token's logits (B, V)."""
        cache = cast(PrefixCache, cache)
        padding = F.pad(cache.padding, (0, 1), value=False)
        reading = Reading(cache.seen, full_mask(cache.seen_padding))
        embedded = self._language.get_input_embeddings()(tokens[:, None])
        output = self._run(embedded, padding, reading, past=cache.layers)
        return self.token_logits(output.last_hidden_state[:, 0]), PrefixCache(
            causal_lm.from_cache(output.past_key_values),
            padding,
            cache.num_tokens + 1,
            seen=cache.seen,
            seen_padding=cache.seen_padding,
        )

    def embed(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Returns what the language model reads, (B, L, D), and its padding, (B, L)."""
        return self._sequence(inputs, *self._read_image(inputs))

    def _read_image(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Returns visual tokens (B, Q, D) and which of them are padding, (B, Q)."""
        features = blocks.to_float(self.region_features(inputs))
        if self.config.position_fourier:
            locations = blocks.fourier_boxes(inputs.boxes, self.config.position_fourier)
            features = torch.cat([features, locations.to(features.dtype)], dim=-1)
        visual, unseen = self.visual(features, inputs.region_padding)
        return F.dropout(visual, self.config.dropout, self.training), unseen

    def _sequence(self, inputs: Inputs, visual: Tensor, unseen: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what the language model reads, (B, L, D), and its padding, (B, L)."""
        text = self._language.get_input_embeddings()(inputs.tokens)
        if not self.config.prefix:
            return text, inputs.token_padding
        room = getattr(self._language.config, "max_position_embeddings", None)
        if room is not None and visual.shape[1] + self.config.max_positions > room:
            raise ModelError(
                f"{visual.shape[1]} visual tokens and max_positions={self.config.max_positions} do "
                f"not fit the decoder's {room} positions; lower max_positions, or use a resampler"
            )
        padding = torch.cat([unseen, inputs.token_padding], dim=1)
        return torch.cat([visual.to(text.dtype), text], dim=1), padding

    def _gated_reading(self, visual: Tensor, unseen: Tensor) -> Reading:
        gates = cast(Sequence[GatedCrossAttention], self.gates)
        return Reading([gate.read(visual) for gate in gates], full_mask(unseen))

    def _run(
        self,
        embedded: Tensor,
        padding: Tensor,
        reading: Reading,
        past: tuple[Pair, ...] | None = None,
        attention: bool = False,
    ) -> Any:
        """Runs the language model over (B, S, D), which come after `past`; None: keep no cache.

        `padding` (B, P + S) covers both. Padding is not counted in positions, wherever it stands.
        """
        positions = ((~padding).cumsum(1) - 1).clamp(min=0)[:, -embedded.shape[1] :]
        self._reading = reading
        output = self._language.base_model(
            inputs_embeds=embedded,
            attention_mask=(~padding).long(),
            position_ids=positions,
            past_key_values=causal_lm.as_cache(past) if past else None,
            use_cache=past is not None,
            output_attentions=attention,
        )
        self._reading = None
        return output

    def _run_block(
        self,
        block: Any,
        gate: int | None,
        states: Tensor,
        *arguments: Any,
        **settings: Any,
    ) -> Any:
        """Stands for a block's own forward, `block`, in the language model."""
        reading = self._reading
        if gate is not None and reading is not None:
            layer = cast(GatedCrossAttention, self.gates[gate])
            key, value = reading.seen[gate]
            if reading.maps is not None:
                reading.maps.append(layer.attention_map(states, key, reading.mask))
            states = self.run_layer(layer, states, key, value, reading.mask)
        return self.run_layer(partial(block, **settings), states, *arguments)

    def _run_with_maps(
        self, embedded: Tensor, padding: Tensor, reading: Reading
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Also returns maps of every layer in which text reads regions, gated ones last."""
        reading.maps = []
        usual = self._language.config._attn_implementation
        self._language.set_attn_implementation("eager")  # the fused kernels make no maps
        output = self._run(embedded, padding, reading, attention=True)
        self._language.set_attn_implementation(usual)
        num_regions = reading.mask.shape[-1]
        if not self.config.prefix:
            maps = [_text_reads(weights) for weights in reading.maps]
            return output.last_hidden_state, tuple(maps)
        text_first = torch.arange(embedded.shape[1], device=embedded.device).roll(-num_regions)
        visible = (~padding)[:, None, :, None]  # what a position of padding reads is not defined
        maps = [
            (weights * visible)[:, :, text_first][..., text_first] for weights in output.attentions
        ]
        maps += [_text_reads(weights[:, :, num_regions:]) for weights in reading.maps]
        return output.last_hidden_state, tuple(maps)


def _text_reads(weights: Tensor) -> Tensor:
    """Lays text reading regions, (B, H, T, R), into a map of everything, (B, H, T+R, T+R)."""
    num_tokens = weights.shape[2]
    return F.pad(weights, (num_tokens, 0, 0, weights.shape[3]))


def _projection(config: VisualPrefixConfig) -> nn.Module:
    feature_dim = config.feature_dim + config.position_fourier
    if config.projection == "resampler":
        return Resampler(
            feature_dim,
            config.width,
            config.num_queries,
            config.resampler_layers,
            config.num_heads,
            config.intermediate_size,
        )
    return Projection(feature_dim, config.width, 2 if config.projection == "mlp" else 1)


def _blocks(decoder: nn.Module, depth: int) -> nn.ModuleList:
    """Finds a language model's blocks: the largest list of modules as long as it is deep."""
    lists = [
        module
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not lists:
        raise ModelError(f"decoder: {type(decoder).__name__} has no list of {depth} blocks")
    return max(lists, key=lambda each: sum(p.numel() for p in each.parameters()))


def decoder_layout(config: VisualPrefixConfig) -> Layout:
    """The language model's own files, which fill it; what reads the image is newly initialised."""
    with torch.device("meta"):  # only for its names
        decoder: Any = causal_lm.build(config.decoder, config.vocab_size)
    names = [name for name, _ in decoder.named_parameters()]
    first = {id(parameter): name for name, parameter in decoder.named_parameters()}
    every = decoder.named_parameters(remove_duplicate=False)
    prefix = f"{decoder.base_model_prefix}."
    masks = ("attn.bias", "attn.masked_bias")  # which old GPT-2 files keep beside the weights
    return Layout(
        prefix=prefix,
        names={f"decoder.{name}": (name,) for name in names},
        tied={name: first[id(each)] for name, each in every if name != first[id(each)]},
        optional=("visual", "gates", "match_head", "answer_head"),
        ignored=tuple(
            f"{prefix}h.{index}.{mask}"
            for index in range(decoder.config.num_hidden_layers)
            for mask in masks
        ),
    )
