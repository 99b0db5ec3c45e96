"""ViLBERT: attention fusion by co-attention between a text stream and a region stream."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pipeline.models import blocks, layouts
from pipeline.models.base import MaskKind, ModelConfig, Size, VisionLanguageModel
from pipeline.models.inputs import Encoded, Inputs
from pipeline.models.layouts import Layout
from pipeline.models.packed import PackedLayout


class VilbertConfig(ModelConfig):
    """Sizes of a ViLBERT; the defaults are the published 6-connect one, but for its answers.

    Co-attention k comes before text layer `text_connections[k]` and region layer
    `region_connections[k]`. The published 2-, 4- and 8-connect models have as many region layers,
    connected from the first on, and are connected to their last text layers: [10, 11], [8 … 11],
    [4 … 11].
    """

    text_layers: Size = Field(default=12, description="layers of the text stream")
    region_width: Size = Field(default=1024, description="values of a region's state")
    region_heads: Size = Field(default=8, description="attention heads of a region layer")
    region_layers: Size = Field(default=6, description="layers of the region stream")
    region_intermediate_size: Size = Field(
        default=1024, description="width of a region layer's feed-forward part"
    )
    co_width: Size = Field(default=1024, description="of the co-attention and the pooled state")
    co_heads: Size = Field(default=8, description="attention heads of the co-attention")
    text_connections: tuple[int, ...] = Field(
        default=(6, 7, 8, 9, 10, 11), description="the text layers that a co-attention comes before"
    )
    region_connections: tuple[int, ...] = Field(
        default=(0, 1, 2, 3, 4, 5), description="the region layers that a co-attention comes before"
    )
    num_objects: Size = Field(
        default=1601, description="classes of the published detector, background first"
    )

    @model_validator(mode="after")
    def _connections_fit(self) -> "VilbertConfig":
        for name, connections, num_layers in (
            ("text_connections", self.text_connections, self.text_layers),
            ("region_connections", self.region_connections, self.region_layers),
        ):
            if list(connections) != sorted(set(connections)) or not all(
                0 <= layer < num_layers for layer in connections
            ):
                raise ValueError(f"{name}={connections} must ascend within {num_layers} layers")
        if len(self.text_connections) != len(self.region_connections):
            raise ValueError("text_connections and region_connections must be as many")
        for width, heads in (("region_width", "region_heads"), ("co_width", "co_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(f"{width} must be a multiple of {heads}")
        return self


class RegionEmbeddings(nn.Module):
    """Features and place of regions, each projected, summed, normed."""

    def __init__(self, config: VilbertConfig) -> None:
        super().__init__()
        self.feature = blocks.FeatureLinear(config.feature_dim, config.region_width)
        self.place = blocks.FeatureLinear(5, config.region_width)
        self.norm = nn.LayerNorm(config.region_width, eps=blocks.LAYER_NORM_EPS)

    def forward(self, features: Tensor, locations: Tensor) -> Tensor:
        """Maps features (B, R, F) and x1, y1, x2, y2, area (B, R, 5) to (B, R, E)."""
        embedded: Tensor = self.norm(self.feature(features) + self.place(locations))
        return embedded


class ConnectionLayer(nn.Module):
    """Co-attention, then each stream's feed-forward."""

    def __init__(self, config: VilbertConfig) -> None:
        super().__init__()
        self.attention = blocks.CoAttention(
            config.width, config.region_width, config.co_width, config.co_heads, config.dropout
        )
        self.text_feed_forward = blocks.FeedForward(
            config.width, config.intermediate_size, config.dropout
        )
        self.region_feed_forward = blocks.FeedForward(
            config.region_width, config.region_intermediate_size, config.dropout
        )

    def forward(
        self, text: Tensor, regions: Tensor, text_layout: PackedLayout, region_layout: PackedLayout
    ) -> tuple[Tensor, Tensor, blocks.Heads, blocks.Heads]:
        """Maps text and regions, each as its layout packs it, to the same shapes and the heads."""
        text, regions, text_heads, region_heads = self.attention(
            text, regions, text_layout, region_layout
        )
        text, regions = self.text_feed_forward(text), self.region_feed_forward(regions)
        return text, regions, text_heads, region_heads


class Vilbert(VisionLanguageModel):
    """ViLBERT (arXiv:1908.02265; code github.com/facebookresearch/vilbert-multi-task).

    Before the regions stands one for the whole image: the mean of their features, over the box of
    the image. It is left out of Encoded. In the match head 0 means that text and image match.
    """

    match_index = 0
    config: VilbertConfig

    def __init__(self, config: VilbertConfig) -> None:
        super().__init__()
        self.config = config
        self.text_embeddings = blocks.TextEmbeddings(
            config.vocab_size, config.max_positions, config.type_vocab_size, config.width
        )
        self.text_norm = nn.LayerNorm(config.width, eps=blocks.LAYER_NORM_EPS)
        self.region_embeddings = RegionEmbeddings(config)
        self.text_layers = nn.ModuleList(
            blocks.TransformerLayer(
                config.width, config.num_heads, config.intermediate_size, config.dropout
            )
            for _ in range(config.text_layers)
        )
        self.region_layers = nn.ModuleList(
            blocks.TransformerLayer(
                config.region_width,
                config.region_heads,
                config.region_intermediate_size,
                config.dropout,
            )
            for _ in range(config.region_layers)
        )
        self.connections = nn.ModuleList(ConnectionLayer(config) for _ in config.text_connections)
        self.text_pooler = nn.Linear(config.width, config.co_width)
        self.region_pooler = nn.Linear(config.region_width, config.co_width)
        self.token_head = blocks.TokenHead(self.text_embeddings.word)
        self.match_head = nn.Linear(config.co_width, 2)
        self.object_transform = blocks.HeadTransform(config.region_width)
        self.object_head = nn.Linear(config.region_width, config.num_objects)
        if config.num_answers:
            self.answer_head = blocks.AnswerHead(config.co_width, config.num_answers)
        blocks.initialise(self, config.initializer_range)

    def encode(
        self, inputs: Inputs, *, mask: MaskKind = "full", attention: bool = False
    ) -> Encoded:
        """Encodes a batch; regions have the width E, pooled that of the co-attention.

        Attention maps are those of the co-attention: text reads regions, regions read text, and
        the other two blocks are zero. The column of the whole image is left out.
        """
        self.require_mask(mask)
        text_layout = PackedLayout.of(inputs.token_padding)
        region_layout = PackedLayout.of(F.pad(inputs.region_padding, (1, 0), value=False))
        text = text_layout.pack(self._embed_text(inputs))
        regions = region_layout.pack(self._embed_regions(inputs))
        maps = []
        text_done = regions_done = 0
        for layer, text_next, regions_next in zip(
            self.connections,
            self.config.text_connections,
            self.config.region_connections,
            strict=True,
        ):
            text = self._run_layers(self.text_layers[text_done:text_next], text, text_layout)
            regions = self._run_layers(
                self.region_layers[regions_done:regions_next], regions, region_layout
            )
            text, regions, text_heads, region_heads = self.run_layer(
                layer, text, regions, text_layout, region_layout
            )
            if attention:
                maps.append(_map(text_heads, region_heads, text_layout.mask, region_layout.mask))
            text_done, regions_done = text_next, regions_next
        text = self._run_layers(self.text_layers[text_done:], text, text_layout)
        regions = self._run_layers(self.region_layers[regions_done:], regions, region_layout)
        text, regions = text_layout.pad(text), region_layout.pad(regions)
        pooled = self.text_pooler(text[:, 0]).relu() * self.region_pooler(regions[:, 0]).relu()
        pooled = F.dropout(pooled, self.config.dropout, self.training)
        return Encoded(text, regions[:, 1:], pooled, tuple(maps) if attention else None)

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

    def region_predictions(self, states: Tensor) -> dict[str, Tensor]:
        return {"objects": self.object_head(self.object_transform(states))}

    def _embed_text(self, inputs: Inputs) -> Tensor:
        positions = self.positions(inputs.tokens)
        embedded = self.text_norm(self.text_embeddings(inputs.tokens, positions))
        return F.dropout(embedded, self.config.dropout, self.training)

    def _embed_regions(self, inputs: Inputs) -> Tensor:
        features, boxes = blocks.to_float(self.region_features(inputs)), inputs.boxes
        hidden = inputs.region_padding
        if inputs.masked_regions is not None:  # the mean must not tell what was hidden
            hidden = hidden | inputs.masked_regions
        image = blocks.masked_mean(features, hidden).unsqueeze(1)
        sizes = boxes[..., 2:] - boxes[..., :2]
        locations = torch.cat([boxes, sizes.prod(-1, keepdim=True)], dim=-1)
        everywhere = locations.new_tensor([0.0, 0.0, 1.0, 1.0, 1.0]).expand(len(locations), 1, 5)
        embedded = self.region_embeddings(
            torch.cat([image, features], dim=1), torch.cat([everywhere, locations], dim=1)
        )
        return F.dropout(embedded, self.config.dropout, self.training)

    def _run_layers(self, layers: nn.ModuleList, states: Tensor, layout: PackedLayout) -> Tensor:
        for layer in layers:
            states, _ = self.run_layer(layer, states, layout)
        return states


def _map(
    text: blocks.Heads, regions: blocks.Heads, text_mask: Tensor, region_mask: Tensor
) -> Tensor:
    """Lays both directions of co-attention into one map, (B, H, T+R, T+R)."""
    read = blocks.attention_map(text.query, regions.key, region_mask)[..., 1:]
    seen = blocks.attention_map(regions.query, text.key, text_mask)[..., 1:, :]
    num_tokens, num_regions = read.shape[-2:]
    return blocks.joint_map(
        read.new_zeros(*read.shape[:2], num_tokens, num_tokens),
        read,
        seen,
        read.new_zeros(*read.shape[:2], num_regions, num_regions),
    )


_HEADS = ("match_head", "object_transform", "object_head", "answer_head")


def original_layout(config: VilbertConfig) -> Layout:
    """The `.bin` files of BertForMultiModalPreTraining and VILBertForVLTasks."""
    head_names, tied = layouts.token_head("token_head", "cls.predictions", "bert.embeddings")
    connections: layouts.Names = {}
    for index in range(len(config.text_connections)):
        ours, theirs = f"connections.{index}", f"bert.encoder.c_layer.{index}"
        # Theirs number the streams, vision first.
        for number, stream, letter in (("1", "region", "v"), ("2", "text", "t")):
            attention, output = f"{ours}.attention", f"{theirs}.biOutput"
            connections |= {
                **layouts.qkv(f"{attention}.{stream}_qkv", f"{theirs}.biattention", number),
                **layouts.linear(f"{attention}.{stream}_out", f"{output}.dense{number}"),
                **layouts.linear(f"{attention}.{stream}_norm", f"{output}.LayerNorm{number}"),
                **layouts.linear(f"{attention}.unused_{stream}", f"{output}.q_dense{number}"),
                **layouts.feed_forward(
                    f"{ours}.{stream}_feed_forward",
                    f"{theirs}.{letter}_intermediate",
                    f"{theirs}.{letter}_output",
                ),
            }
    regions = "bert.v_embeddings"
    return Layout(
        prefix="bert.",
        names={
            **layouts.text_embeddings("text_embeddings", "text_norm", "bert.embeddings"),
            **layouts.linear("region_embeddings.feature", f"{regions}.image_embeddings"),
            **layouts.linear("region_embeddings.place", f"{regions}.image_location_embeddings"),
            **layouts.linear("region_embeddings.norm", f"{regions}.LayerNorm"),
            **layouts.transformer_layers("text_layers", "bert.encoder.layer", config.text_layers),
            **layouts.transformer_layers(
                "region_layers", "bert.encoder.v_layer", config.region_layers
            ),
            **connections,
            **layouts.linear("text_pooler", "bert.t_pooler.dense"),
            **layouts.linear("region_pooler", "bert.v_pooler.dense"),
            **head_names,
            **layouts.linear("match_head", "cls.bi_seq_relationship"),
            **layouts.transform("object_transform", "cls.imagePredictions.transform"),
            **layouts.linear("object_head", "cls.imagePredictions.decoder"),
            **layouts.answer_head("answer_head", "vil_prediction.logit_fc"),
        },
        tied=tied,
        optional=("token_head", *_HEADS),
        ignored=(  # heads of other benchmarks
            "vil_prediction_gqa.",
            "vil_binary_prediction.",
            "vil_tri_prediction.",
            "vil_logit.",
            "vision_logit.",
            "linguisic_logit.",
        ),
    )


def bert_layout(config: VilbertConfig) -> Layout:
    """BERT's own files, which fill the text stream."""
    return layouts.bert(
        text_norm="text_norm",
        layers="text_layers",
        num_layers=config.text_layers,
        pooler=None,
        optional=(
            "region_embeddings",
            "region_layers",
            "connections",
            "text_pooler",
            "region_pooler",
            *_HEADS,
        ),
    )


def to_document(config: VilbertConfig, answers: Sequence[str]) -> dict[str, Any]:
    """Returns a `config.json` with the keys of the original repository's."""
    return {
        "model_type": "vilbert",
        "architectures": ["BertForMultiModalPreTraining"],
        **layouts.bert_sizes(config),
        "num_hidden_layers": config.text_layers,
        "v_feature_size": config.feature_dim,
        "v_target_size": config.num_objects,
        "v_hidden_size": config.region_width,
        "v_num_hidden_layers": config.region_layers,
        "v_num_attention_heads": config.region_heads,
        "v_intermediate_size": config.region_intermediate_size,
        "bi_hidden_size": config.co_width,
        "bi_num_attention_heads": config.co_heads,
        "v_biattention_id": list(config.region_connections),
        "t_biattention_id": list(config.text_connections),
        **layouts.labels(config.num_answers, answers),
    }


def from_document(document: Mapping[str, Any]) -> VilbertConfig:
    """Reads such a `config.json`, or one of the original repository's `config/*.json`."""
    return VilbertConfig(
        **layouts.from_bert_sizes(document),
        text_layers=layouts.whole(document, "num_hidden_layers"),
        feature_dim=layouts.whole(document, "v_feature_size"),
        num_objects=layouts.whole(document, "v_target_size"),
        region_width=layouts.whole(document, "v_hidden_size"),
        region_layers=layouts.whole(document, "v_num_hidden_layers"),
        region_heads=layouts.whole(document, "v_num_attention_heads"),
        region_intermediate_size=layouts.whole(document, "v_intermediate_size"),
        co_width=layouts.whole(document, "bi_hidden_size"),
        co_heads=layouts.whole(document, "bi_num_attention_heads"),
        region_connections=layouts.whole_numbers(document, "v_biattention_id"),
        text_connections=layouts.whole_numbers(document, "t_biattention_id"),
        num_answers=layouts.num_answers(document),
    )
