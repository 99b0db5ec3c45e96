"""Attention fusion in its plainest form: each word reads the regions once, with one head."""

import torch
from torch import Tensor, nn

from pipeline.models import blocks
from pipeline.models.base import MaskKind
from pipeline.models.inputs import Encoded, Inputs
from pipeline.models.layouts import Layout
from pipeline.models.packed import full_mask
from pipeline.models.two_stream import TwoStream, TwoStreamConfig, text_layout


class AttentionFusionConfig(TwoStreamConfig):
    """Sizes of two encoders that share a width."""


class AttentionFusion(TwoStream):
    """F = W_f [T; A V] with A = softmax(T W_a V^T): T text states, V region states.

    Heads read F, so words see the image; regions never see the text.
    """

    config: AttentionFusionConfig

    def __init__(self, config: AttentionFusionConfig) -> None:
        super().__init__(config, pooled_width=config.width)
        self.affinity = nn.Linear(config.width, config.width, bias=False)  # W_a
        self.fusion = nn.Linear(2 * config.width, config.width)  # W_f
        self.pooler = blocks.Pooler(config.width)
        self.match_head = nn.Linear(config.width, 2)
        blocks.initialise(self, config.initializer_range)

    def encode(
        self, inputs: Inputs, *, mask: MaskKind = "full", attention: bool = False
    ) -> Encoded:
        """Encodes a batch; the one attention map, of one head, has text reading regions only."""
        self.require_mask(mask)
        text, regions = self.encode_text(inputs), self.encode_regions(inputs)
        visible = full_mask(inputs.region_padding)
        query, value = self.affinity(text).unsqueeze(1), regions.unsqueeze(1)
        read = blocks.attend(query, value, value, visible, scale=1.0)
        fused = self.fusion(torch.cat([text, read], dim=-1))
        maps = None
        if attention:
            maps = (_map(blocks.attention_map(query, value, visible, scale=1.0)),)
        return Encoded(fused, regions, self.pooler(fused[:, 0]), maps)


def _map(weights: Tensor) -> Tensor:
    """Lays text reading regions, (B, 1, T, R), into a map of everything, (B, 1, T+R, T+R)."""
    num_samples, _, num_tokens, num_regions = weights.shape
    return blocks.joint_map(
        weights.new_zeros(num_samples, 1, num_tokens, num_tokens),
        weights,
        weights.new_zeros(num_samples, 1, num_regions, num_tokens),
        weights.new_zeros(num_samples, 1, num_regions, num_regions),
    )


def bert_layout(config: AttentionFusionConfig) -> Layout:
    """BERT's own files, which fill the text encoder from their first layers."""
    return text_layout(config, pooler="pooler", optional=("affinity", "fusion"))
