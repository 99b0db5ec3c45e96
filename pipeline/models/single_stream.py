"""The single-stream encoder of early fusion: one BERT over tokens and regions together."""

from abc import abstractmethod

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pipeline.models import blocks
from pipeline.models.base import MaskKind, ModelConfig, Size, VisionLanguageModel
from pipeline.models.inputs import Cache, Encoded, Inputs
from pipeline.models.packed import PackedLayout, full_mask, prefix_mask


class SingleStreamConfig(ModelConfig):
    """Sizes of a one-stream model."""

    num_layers: Size = Field(default=12, description="layers of the one stream")


class SingleStream(VisionLanguageModel):
    """One encoder over [text, regions]; under the prefix mask it also writes text.

    A family says how text and regions are embedded and where answers are read.
    """

    masks = ("full", "prefix")
    config: SingleStreamConfig

    def __init__(self, config: SingleStreamConfig) -> None:
        super().__init__()
        self.config = config
        self.text_embeddings = blocks.TextEmbeddings(
            config.vocab_size, config.max_positions, config.type_vocab_size, config.width
        )
        self.layers = nn.ModuleList(
            blocks.TransformerLayer(
                config.width, config.num_heads, config.intermediate_size, config.dropout
            )
            for _ in range(config.num_layers)
        )
        self.pooler = blocks.Pooler(config.width)
        self.token_head = blocks.TokenHead(self.text_embeddings.word)
        self.match_head = nn.Linear(config.width, 2)

    @abstractmethod
    def embed_text(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Maps tokens (B, T) and positions (T,) or (B, T) to what enters the stream, (B, T, D)."""

    @abstractmethod
    def embed_regions(self, inputs: Inputs) -> Tensor:
        """Returns the batch's regions as they enter the stream, (B, R, D)."""

    def encode(
        self, inputs: Inputs, *, mask: MaskKind = "full", attention: bool = False
    ) -> Encoded:
        layout = _layout(inputs, mask)
        states = layout.pack(self._embed(inputs))
        maps = []
        for layer in self.layers:
            states, heads = self.run_layer(layer, states, layout)
            if attention:
                maps.append(blocks.attention_map(heads.query, heads.key, layout.mask))
        text, regions = layout.pad(states).tensor_split([inputs.tokens.shape[1]], dim=1)
        return Encoded(text, regions, self.pooler(text[:, 0]), tuple(maps) if attention else None)

    def token_logits(self, states: Tensor) -> Tensor:
        logits: Tensor = self.token_head(states)
        return logits

    def match_logits(self, encoded: Encoded) -> Tensor:
        logits: Tensor = self.match_head(encoded.pooled)
        return logits

    def start(self, inputs: Inputs) -> tuple[Tensor, Cache]:
        """Reads image and prefix tokens under the prefix mask, and keeps their keys and values.

        Returns logits (B, V) of the token after each row's last real one.
        """
        layout = _layout(inputs, "prefix")
        states = layout.pack(self._embed(inputs))
        remembered = []
        for layer in self.layers:
            states, heads = layer(states, layout)
            remembered.append((heads.key, heads.value))
        padding = torch.cat([inputs.token_padding, inputs.region_padding], dim=1)
        last = blocks.states_from_end(layout.pad(states), inputs.token_padding, back=1)
        num_tokens = (~inputs.token_padding).sum(1)
        return self.token_head(last), Cache(tuple(remembered), padding, num_tokens)

    def extend(self, tokens: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Reads one more token per row, (B,); returns the next token's logits (B, V)."""
        states = self.embed_text(tokens[:, None], cache.num_tokens[:, None])
        padding = F.pad(cache.padding, (0, 1), value=False)
        layout = PackedLayout(full_mask(padding), shape=(len(tokens), 1))
        remembered = []
        for layer, past in zip(self.layers, cache.layers, strict=True):
            states, heads = layer(states, layout, past)
            remembered.append((heads.key, heads.value))
        return self.token_head(states[:, 0]), Cache(
            tuple(remembered), padding, cache.num_tokens + 1
        )

    def _embed(self, inputs: Inputs) -> Tensor:
        text = self.embed_text(inputs.tokens, self.positions(inputs.tokens))
        embedded = torch.cat([text, self.embed_regions(inputs)], dim=1)
        return F.dropout(embedded, self.config.dropout, self.training)


def _layout(inputs: Inputs, mask: MaskKind) -> PackedLayout:
    """Returns the layout of the stream, text first."""
    padding = torch.cat([inputs.token_padding, inputs.region_padding], dim=1)
    if mask == "prefix":
        return PackedLayout.of(padding, prefix_mask(inputs.token_padding, inputs.region_padding))
    return PackedLayout.of(padding)
