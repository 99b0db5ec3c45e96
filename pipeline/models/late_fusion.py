"""Late fusion: text and image meet only as two vectors, side by side or as a dot product."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pipeline.models import blocks
from pipeline.models.base import MaskKind
from pipeline.models.inputs import Encoded, Inputs
from pipeline.models.layouts import Layout
from pipeline.models.two_stream import TwoStream, TwoStreamConfig, text_layout


class LateFusionConfig(TwoStreamConfig):
    """Sizes of two encoders that share a width."""


class Temperature(nn.Module):
    """The learned factor between cosine similarity and logit, at first 1 / 0.07 (CLIP)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def forward(self, similarity: Tensor) -> Tensor:
        """Scales cosine similarities of any shape to logits, at most by 100."""
        return similarity * self.log_scale.exp().clamp(max=100.0)


class LateFusion(TwoStream):
    """Two encoders; a linear map and ReLU each; the concatenation is what heads read.

    Text is summarised by its first state, an image by the mean of its regions. Words are predicted
    from text alone. Beside it a contrastive pair of projections makes the dual encoder (CLIP,
    arXiv:2103.00020), whose texts and images can be compared without encoding them together.
    """

    config: LateFusionConfig

    def __init__(self, config: LateFusionConfig) -> None:
        super().__init__(config, pooled_width=2 * config.width)
        # One linear map of two vectors side by side could not tell which of them belong together.
        self.match_head = blocks.AnswerHead(2 * config.width, 2)
        self.text_map = nn.Linear(config.width, config.width)
        self.image_map = nn.Linear(config.width, config.width)
        self.text_projection = nn.Linear(config.width, config.width, bias=False)
        self.image_projection = nn.Linear(config.width, config.width, bias=False)
        self.temperature = Temperature()
        blocks.initialise(self, config.initializer_range)

    def encode(
        self, inputs: Inputs, *, mask: MaskKind = "full", attention: bool = False
    ) -> Encoded:
        """Encodes a batch; there are no attention maps, as no layer reads both modalities."""
        self.require_mask(mask)
        text, regions = self.encode_text(inputs), self.encode_regions(inputs)
        image = blocks.masked_mean(regions, inputs.region_padding)
        pooled = [self.text_map(text[:, 0]).relu(), self.image_map(image).relu()]
        return Encoded(text, regions, torch.cat(pooled, dim=-1), () if attention else None)

    def contrastive(self, encoded: Encoded, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Returns unit vectors of texts and of images, (B, D) each.

        `temperature` scales their dot products to logits.
        """
        image = blocks.masked_mean(encoded.regions, inputs.region_padding)
        return (
            F.normalize(self.text_projection(encoded.text[:, 0]), dim=-1),
            F.normalize(self.image_projection(image), dim=-1),
        )


def bert_layout(config: LateFusionConfig) -> Layout:
    """BERT's own files, which fill the text encoder from their first layers."""
    fusion = ("text_map", "image_map", "text_projection", "image_projection", "temperature")
    return text_layout(config, pooler=None, optional=fusion)
