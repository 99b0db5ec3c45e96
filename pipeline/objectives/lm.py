"""Captioning as a language model: each next word from the picture and the words before it."""

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.config import Config
from pipeline.data.load.loader import Batch
from pipeline.objectives.base import IGNORED, Encodings, Stream, Vocabulary
from pipeline.objectives.token_objective import TokenObjective


class LmConfig(Config):
    """Cross-entropy without label smoothing."""

    weight: float = Field(
        default=1.0, gt=0, description="factor of its loss in the sum of the objectives'"
    )

    def build(self) -> "list[LanguageModelling]":
        return [LanguageModelling(self)]


class LanguageModelling(TokenObjective):
    """Next-token prediction under the prefix mask (Unified VLP, arXiv:1909.11059, 3.2).

    Unlike the paper's sequence-to-sequence objective it predicts every token, from the first
    after [CLS] to the closing [SEP], rather than masked ones.
    """

    name = "lm"
    stream = Stream("captions", "prefix")

    def __init__(self, config: LmConfig) -> None:
        super().__init__(config.weight)

    def prepare(
        self,
        batch: Batch,  # noqa: ARG002
        encodings: Encodings,
        vocabulary: Vocabulary,  # noqa: ARG002
        drawn: None,  # noqa: ARG002
    ) -> tuple[Encodings, Tensor]:
        """The target (B, T) of a position is the token after it."""
        target = np.full_like(encodings.tokens, IGNORED)
        target[:, :-1] = np.where(encodings.padding[:, 1:], IGNORED, encodings.tokens[:, 1:])
        return encodings, torch.from_numpy(target)
