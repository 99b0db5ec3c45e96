"""The two encoders of text and regions, where late and attention fusion begin."""

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pipeline.models import blocks, layouts
from pipeline.models.base import ModelConfig, Size, VisionLanguageModel
from pipeline.models.inputs import Encoded, Inputs
from pipeline.models.layouts import Layout
from pipeline.models.packed import PackedLayout


class TwoStreamConfig(ModelConfig):
    """Sizes of a text encoder and a region encoder of the same width."""

    text_layers: Size = Field(default=12, description="layers of the text encoder")
    region_layers: int = Field(
        default=0,
        ge=0,
        description="layers of the region encoder; 0: regions are embedded, but do not see each "
        "other",
    )


def text_layout(config: TwoStreamConfig, pooler: str | None, optional: tuple[str, ...]) -> Layout:
    """BERT's own files, which fill the text encoder from their first layers."""
    return layouts.bert(
        text_norm="text_norm",
        layers="text_layers",
        num_layers=config.text_layers,
        pooler=pooler,
        optional=("region_embeddings", "region_layers", "match_head", "answer_head", *optional),
    )


class TwoStream(VisionLanguageModel):
    """A BERT over text, and region embeddings with layers over regions; families fuse the two."""

    match_index = 1
    match_head: nn.Module  # from the pooled state to two logits
    config: TwoStreamConfig

    def __init__(self, config: TwoStreamConfig, pooled_width: int) -> None:
        super().__init__()
        self.config = config
        self.text_embeddings = blocks.TextEmbeddings(
            config.vocab_size, config.max_positions, config.type_vocab_size, config.width
        )
        self.text_norm = nn.LayerNorm(config.width, eps=blocks.LAYER_NORM_EPS)
        self.text_layers = _layers(config, config.text_layers)
        self.region_embeddings = blocks.RegionEmbeddings(config.feature_dim, config.width)
        self.region_layers = _layers(config, config.region_layers)
        self.token_head = blocks.TokenHead(self.text_embeddings.word)
        if config.num_answers:
            self.answer_head = blocks.AnswerHead(pooled_width, config.num_answers)

    def encode_text(self, inputs: Inputs) -> Tensor:
        """Returns text that has seen text only, (B, T, D)."""
        layout = PackedLayout.of(inputs.token_padding)
        return layout.pad(self.text_states(inputs, layout))

    def encode_regions(self, inputs: Inputs) -> Tensor:
        """Returns regions that have seen regions only, (B, R, D)."""
        layout = PackedLayout.of(inputs.region_padding)
        return layout.pad(self.region_states(inputs, layout))

    def text_states(self, inputs: Inputs, layout: PackedLayout) -> Tensor:
        """As encode_text, packed."""
        positions = self.positions(inputs.tokens)
        states: Tensor = self.text_norm(self.text_embeddings(inputs.tokens, positions))
        states = layout.pack(F.dropout(states, self.config.dropout, self.training))
        for layer in self.text_layers:
            states, _ = self.run_layer(layer, states, layout)
        return states

    def region_states(self, inputs: Inputs, layout: PackedLayout) -> Tensor:
        """As encode_regions, packed."""
        states: Tensor = self.region_embeddings(self.region_features(inputs), inputs.boxes)
        states = layout.pack(F.dropout(states, self.config.dropout, self.training))
        for layer in self.region_layers:
            states, _ = self.run_layer(layer, states, layout)
        return states

    def token_logits(self, states: Tensor) -> Tensor:
        logits: Tensor = self.token_head(states)
        return logits

    def match_logits(self, encoded: Encoded) -> Tensor:
        logits: Tensor = self.match_head(encoded.pooled)
        return logits

    def answer_logits(self, encoded: Encoded, inputs: Inputs) -> Tensor:  # noqa: ARG002
        """Reads answers from the pooled state."""
        self.require_answers()
        logits: Tensor = self.answer_head(encoded.pooled)
        return logits


def _layers(config: TwoStreamConfig, num_layers: int) -> nn.ModuleList:
    return nn.ModuleList(
        blocks.TransformerLayer(
            config.width, config.num_heads, config.intermediate_size, config.dropout
        )
        for _ in range(num_layers)
    )
