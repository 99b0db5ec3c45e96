"""UNITER: the one-stream family whose regions carry their place and can be hidden."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pipeline.models import blocks, layouts
from pipeline.models.base import Size
from pipeline.models.inputs import Encoded, Inputs
from pipeline.models.layouts import Layout
from pipeline.models.single_stream import SingleStream, SingleStreamConfig


class UniterConfig(SingleStreamConfig):
    """Sizes of a UNITER; the defaults are UNITER-base, which reads cased text."""

    vocab_size: Size = Field(
        default=28996, description="word pieces of the tokenizer; the default is bert-base-cased's"
    )
    num_objects: Size = Field(
        default=1601, description="classes of the published detector, background first"
    )


class RegionEmbeddings(nn.Module):
    """Features and place of regions, each projected and normed, summed with the segment, normed.

    A hidden region's features have a learned vector added; the caller has set them to zero.
    """

    def __init__(self, feature_dim: int, width: int) -> None:
        super().__init__()
        self.mask = nn.Embedding(2, feature_dim)  # row 0 is in published files, and is not read
        self.feature = blocks.FeatureLinear(feature_dim, width)
        self.feature_norm = nn.LayerNorm(width, eps=blocks.LAYER_NORM_EPS)
        self.place = blocks.FeatureLinear(7, width)
        self.place_norm = nn.LayerNorm(width, eps=blocks.LAYER_NORM_EPS)
        self.norm = nn.LayerNorm(width, eps=blocks.LAYER_NORM_EPS)

    def forward(self, features: Tensor, boxes: Tensor, masked: Tensor, segment: Tensor) -> Tensor:
        """Maps features (B, R, F), boxes (B, R, 4), bool masked (B, R) and segment (B, R, D)."""
        hidden = self.mask(torch.ones_like(masked, dtype=torch.long)) * masked.unsqueeze(-1)
        sizes = boxes[..., 2:] - boxes[..., :2]
        locations = torch.cat([boxes, sizes, sizes.prod(-1, keepdim=True)], dim=-1)
        seen = self.feature_norm(self.feature(blocks.to_float(features) + hidden))
        embedded: Tensor = self.norm(seen + self.place_norm(self.place(locations)) + segment)
        return embedded


class FeatureHead(nn.Module):
    """Predicts a region's features from its state; the last map is the embedding's, transposed."""

    def __init__(self, feature: nn.Linear) -> None:
        super().__init__()
        self.transform = blocks.HeadTransform(feature.out_features)
        self.weight = feature.weight  # shared, and so gathered for this module too
        self.bias = nn.Parameter(torch.zeros(feature.in_features))

    def forward(self, states: Tensor) -> Tensor:
        """Maps (N, D) to (N, F)."""
        return F.linear(self.transform(states), self.weight.t(), self.bias)


class Uniter(SingleStream):
    """UNITER (arXiv:1909.11740; code github.com/ChenRocks/UNITER)."""

    match_index = 1
    config: UniterConfig

    def __init__(self, config: UniterConfig) -> None:
        super().__init__(config)
        self.text_norm = nn.LayerNorm(config.width, eps=blocks.LAYER_NORM_EPS)
        self.region_embeddings = RegionEmbeddings(config.feature_dim, config.width)
        self.feature_head = FeatureHead(self.region_embeddings.feature)
        self.object_transform = blocks.HeadTransform(config.width)
        self.object_head = nn.Linear(config.width, config.num_objects)
        if config.num_answers:
            self.answer_head = blocks.AnswerHead(config.width, config.num_answers)
        blocks.initialise(self, config.initializer_range)

    def embed_text(self, tokens: Tensor, positions: Tensor) -> Tensor:
        embedded: Tensor = self.text_norm(self.text_embeddings(tokens, positions))
        return embedded

    def embed_regions(self, inputs: Inputs) -> Tensor:
        masked = inputs.masked_regions
        if masked is None:
            masked = torch.zeros_like(inputs.region_padding)
        second = torch.ones_like(inputs.region_padding, dtype=torch.long)
        segment = self.text_embeddings.token_type(second)
        embedded: Tensor = self.region_embeddings(
            self.region_features(inputs), inputs.boxes, masked, segment
        )
        return embedded

    def answer_logits(self, encoded: Encoded, inputs: Inputs) -> Tensor:  # noqa: ARG002
        """Reads answers from the pooled state."""
        self.require_answers()
        logits: Tensor = self.answer_head(encoded.pooled)
        return logits

    def region_predictions(self, states: Tensor) -> dict[str, Tensor]:
        objects = self.object_head(self.object_transform(states))
        return {"objects": objects, "features": self.feature_head(states)}


_HEADS = ("match_head", "feature_head", "object_transform", "object_head", "answer_head")


def original_layout(config: UniterConfig) -> Layout:
    """The `.pt` files of UniterForPretraining and UniterForVisualQuestionAnswering."""
    head_names, tied = layouts.token_head("token_head", "cls.predictions", "uniter.embeddings")
    regions = "uniter.img_embeddings"
    return Layout(
        prefix="uniter.",
        names={
            **layouts.text_embeddings("text_embeddings", "text_norm", "uniter.embeddings"),
            **layouts.table("region_embeddings.mask", f"{regions}.mask_embedding"),
            **layouts.linear("region_embeddings.feature", f"{regions}.img_linear"),
            **layouts.linear("region_embeddings.feature_norm", f"{regions}.img_layer_norm"),
            **layouts.linear("region_embeddings.place", f"{regions}.pos_linear"),
            **layouts.linear("region_embeddings.place_norm", f"{regions}.pos_layer_norm"),
            **layouts.linear("region_embeddings.norm", f"{regions}.LayerNorm"),
            **layouts.transformer_layers("layers", "uniter.encoder.layer", config.num_layers),
            **layouts.linear("pooler.dense", "uniter.pooler.dense"),
            **head_names,
            **layouts.linear("match_head", "itm_output"),
            **layouts.linear("feature_head.transform.dense", "feat_regress.net.0"),
            **layouts.linear("feature_head.transform.norm", "feat_regress.net.2"),
            "feature_head.bias": ("feat_regress.bias",),
            **layouts.linear("object_transform.dense", "region_classifier.net.0"),
            **layouts.linear("object_transform.norm", "region_classifier.net.2"),
            **layouts.linear("object_head", "region_classifier.net.3"),
            **layouts.answer_head("answer_head", "vqa_output"),
        },
        tied={**tied, "feat_regress.weight": f"{regions}.img_linear.weight"},
        optional=("token_head", *_HEADS),
    )


def bert_layout(config: UniterConfig) -> Layout:
    """BERT's own files, which fill the stream and the text's embeddings."""
    return layouts.bert(
        text_norm="text_norm",
        layers="layers",
        num_layers=config.num_layers,
        pooler="pooler",
        optional=("region_embeddings", *_HEADS),
    )


def to_document(config: UniterConfig, answers: Sequence[str]) -> dict[str, Any]:
    """Returns a `config.json` with BERT's keys and what the original passes beside them."""
    return {
        "model_type": "uniter",
        "architectures": ["UniterForPretraining"],
        **layouts.bert_sizes(config),
        "num_hidden_layers": config.num_layers,
        "img_dim": config.feature_dim,
        "img_label_dim": config.num_objects,
        **layouts.labels(config.num_answers, answers),
    }


def from_document(document: Mapping[str, Any]) -> UniterConfig:
    """Reads such a `config.json`."""
    return UniterConfig(
        **layouts.from_bert_sizes(document),
        num_layers=layouts.whole(document, "num_hidden_layers"),
        feature_dim=layouts.whole(document, "img_dim"),
        num_objects=layouts.whole(document, "img_label_dim"),
        num_answers=layouts.num_answers(document),
    )
