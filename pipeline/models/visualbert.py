"""VisualBERT: the one-stream family in which regions are words of another segment."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pipeline.models import blocks, layouts
from pipeline.models.inputs import Encoded, Inputs
from pipeline.models.layouts import Layout
from pipeline.models.single_stream import SingleStream, SingleStreamConfig


class VisualBertConfig(SingleStreamConfig):
    """Sizes of a VisualBERT; the defaults are the published one for VQA and COCO.

    Its other checkpoints differ in `feature_dim`: 512 for VCR, 1024 for NLVR2.
    Checkpoints by its authors are refused with another `visual_token_type` than 0, which they had.
    """

    visual_token_type: int = Field(
        default=1,
        ge=0,
        description="the segment that regions belong to: transformers passes 1, the original "
        "code and its checkpoints have 0",
    )
    position_fourier: int = Field(
        default=0, ge=0, multiple_of=8, description="box features beside each region's own; 0: none"
    )

    @model_validator(mode="after")
    def _segment_exists(self) -> "VisualBertConfig":
        if self.visual_token_type >= self.type_vocab_size:
            raise ValueError(
                f"visual_token_type={self.visual_token_type} must be below "
                f"type_vocab_size={self.type_vocab_size}"
            )
        return self


class VisualEmbeddings(nn.Module):
    """Projects region features into the text's space and adds a segment and one shared position.

    The position table has as many rows as the text's because published weights do; without an
    alignment of words to regions only its first row is read. Unlike the paper it can see where a
    region is: `position_fourier` sines and cosines of the box stand beside the features, so that
    the published layout, with a wider projection, still holds all there is.
    """

    def __init__(self, config: VisualBertConfig) -> None:
        super().__init__()
        self.segment = config.visual_token_type
        self.position_fourier = config.position_fourier
        self.projection = blocks.FeatureLinear(
            config.feature_dim + config.position_fourier, config.width
        )
        self.position = nn.Embedding(config.max_positions, config.width)
        self.token_type = nn.Embedding(config.type_vocab_size, config.width)

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        """Maps features (B, R, F) and boxes (B, R, 4) to (B, R, D)."""
        features = blocks.to_float(features)
        if self.position_fourier:
            locations = blocks.fourier_boxes(boxes, self.position_fourier)
            features = torch.cat([features, locations.to(features.dtype)], dim=-1)
        zeros = torch.zeros(features.shape[:2], dtype=torch.long, device=features.device)
        projected: Tensor = self.projection(features)
        projected += self.position(zeros) + self.token_type(zeros + self.segment)
        return projected


class VisualBert(SingleStream):
    """VisualBERT (arXiv:1908.03557).

    Its match head is the original's, in which 1 means that text and image match; transformers'
    documentation of `sentence_image_labels` says the opposite of what the weights were trained on.
    """

    match_index = 1
    config: VisualBertConfig

    def __init__(self, config: VisualBertConfig) -> None:
        super().__init__(config)
        self.visual_embeddings = VisualEmbeddings(config)
        self.embedding_norm = nn.LayerNorm(config.width, eps=blocks.LAYER_NORM_EPS)
        if config.num_answers:
            self.answer_head = nn.Linear(config.width, config.num_answers)
        blocks.initialise(self, config.initializer_range)

    def embed_text(self, tokens: Tensor, positions: Tensor) -> Tensor:
        embedded: Tensor = self.embedding_norm(self.text_embeddings(tokens, positions))
        return embedded

    def embed_regions(self, inputs: Inputs) -> Tensor:
        regions = self.visual_embeddings(self.region_features(inputs), inputs.boxes)
        embedded: Tensor = self.embedding_norm(regions)
        return embedded

    def answer_logits(self, encoded: Encoded, inputs: Inputs) -> Tensor:
        """Reads answers at the last token but one: the [MASK] of "[CLS] question [MASK] [SEP]"."""
        self.require_answers()
        asked = blocks.states_from_end(encoded.text, inputs.token_padding, back=2)
        logits: Tensor = self.answer_head(F.dropout(asked, self.config.dropout, self.training))
        return logits


def transformers_layout(config: VisualBertConfig) -> Layout:
    """transformers' `visual_bert`: ForPreTraining, with ForQuestionAnswering's bare `cls` beside.

    The two heads live in one file, so that VisualBertModel, ForPreTraining and
    ForQuestionAnswering can each open it.
    """
    return _layout(
        config,
        encoder="visual_bert",
        heads="cls",
        answers="cls",
        visual=("visual_projection", "visual_position_embeddings", "visual_token_type_embeddings"),
    )


def original_layout(config: VisualBertConfig) -> Layout:
    """The `.th` files of github.com/uclanlp/visualbert. They expect visual_token_type=0."""
    return _layout(
        config,
        encoder="bert.bert",
        heads="bert.cls",
        answers="bert.classifier",
        visual=("projection", "position_embeddings_visual", "token_type_embeddings_visual"),
        ignored=("detector.",),
        made_with={"visual_token_type": 0},
    )


def bert_layout(config: VisualBertConfig) -> Layout:
    """BERT's own files: they fill the text side, and regions begin with its segment and position.

    The authors' `special_visual_initialize` does the same.
    """
    embeddings = "bert.embeddings"
    return layouts.bert(
        text_norm="embedding_norm",
        layers="layers",
        num_layers=config.num_layers,
        pooler="pooler",
        also={
            **layouts.table("visual_embeddings.position", f"{embeddings}.position_embeddings"),
            **layouts.table("visual_embeddings.token_type", f"{embeddings}.token_type_embeddings"),
        },
        optional=("visual_embeddings.projection", "match_head", "answer_head"),
    )


def _layout(
    config: VisualBertConfig,
    *,
    encoder: str,
    heads: str,
    answers: str,
    visual: tuple[str, str, str],
    ignored: tuple[str, ...] = (),
    made_with: Mapping[str, Any] | None = None,
) -> Layout:
    embeddings = f"{encoder}.embeddings"
    projection, position, token_type = (f"{embeddings}.{name}" for name in visual)
    head_names, tied = layouts.token_head("token_head", f"{heads}.predictions", embeddings)
    return Layout(
        prefix=f"{encoder}.",
        names={
            **layouts.text_embeddings("text_embeddings", "embedding_norm", embeddings),
            **layouts.linear("visual_embeddings.projection", projection),
            **layouts.table("visual_embeddings.position", position),
            **layouts.table("visual_embeddings.token_type", token_type),
            **layouts.transformer_layers("layers", f"{encoder}.encoder.layer", config.num_layers),
            **layouts.linear("pooler.dense", f"{encoder}.pooler.dense"),
            **head_names,
            **layouts.linear("match_head", f"{heads}.seq_relationship"),
            **layouts.linear("answer_head", answers),
        },
        tied=tied,
        optional=("pooler", "token_head", "match_head", "answer_head"),
        ignored=ignored,
        made_with=made_with or {},
    )


def to_transformers(config: VisualBertConfig, answers: Sequence[str]) -> dict[str, Any]:
    """Returns the `config.json` of transformers' `visual_bert`, with our own keys beside.

    With `position_fourier`, transformers must be given features that end in those of the boxes.
    """
    return {
        "model_type": "visual_bert",
        "architectures": ["VisualBertForPreTraining"],
        **layouts.bert_sizes(config),
        "num_hidden_layers": config.num_layers,
        "visual_embedding_dim": config.feature_dim + config.position_fourier,
        **layouts.labels(config.num_answers, answers),
        "visual_token_type": config.visual_token_type,
        "position_fourier": config.position_fourier,
    }


def from_transformers(document: Mapping[str, Any]) -> VisualBertConfig:
    """Reads transformers' `config.json`, or raises ModelError for what this family cannot do."""
    layouts.require(document, "bypass_transformer", False)
    position_fourier = layouts.whole(document, "position_fourier", 0, least=0)
    return VisualBertConfig(
        **layouts.from_bert_sizes(document),
        num_layers=layouts.whole(document, "num_hidden_layers", 12),
        feature_dim=layouts.whole(document, "visual_embedding_dim", 512) - position_fourier,
        visual_token_type=layouts.whole(document, "visual_token_type", 1, least=0),
        position_fourier=position_fourier,
        num_answers=layouts.num_answers(document),
    )
