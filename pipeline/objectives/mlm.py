"""Masked language modelling: hidden words told from the others and the picture."""

import zlib

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.config import Config
from pipeline.data.loader import Batch
from pipeline.models.base import VisionLanguageModel
from pipeline.models.inputs import Encoded, Inputs
from pipeline.objectives.base import IGNORED, Encodings, Objective, Stream, Vocabulary
from pipeline.objectives.token_loss import mean_token_loss

_SALT = zlib.crc32(b"mlm")


class MlmConfig(Config):
    """BERT's corruption; the defaults are those of VisualBERT, LXMERT, ViLBERT and UNITER."""

    weight: float = Field(default=1.0, gt=0)
    mask_fraction: float = Field(default=0.15, gt=0, lt=1)


class MaskedLanguageModelling(Objective):
    """BERT's objective (arXiv:1810.04805, 3.1) with the picture beside the text.

    Of the chosen pieces 80 % read [MASK], 10 % a random piece, 10 % themselves. As in UNITER at
    least one piece of a text is chosen. Special tokens are neither chosen nor put in. Beside
    image-text matching, mismatched pairs count as well, as in VisualBERT and LXMERT (ViLBERT
    leaves them out).
    """

    name = "mlm"
    stream = Stream("captions", "full")

    def __init__(self, config: MlmConfig) -> None:
        super().__init__(config.weight)
        self.mask_fraction = config.mask_fraction

    def prepare(
        self, batch: Batch, encodings: Encodings, vocabulary: Vocabulary
    ) -> tuple[Encodings, Tensor]:
        """Returns the corrupted sequences and the true piece (B, T) at the chosen places."""
        tokens = encodings.tokens.copy()
        target = np.full_like(tokens, IGNORED)
        for i, is_word in enumerate(encodings.is_word):
            places = np.flatnonzero(is_word)
            if not len(places):
                continue
            rng = batch.rng(i, _SALT)
            is_chosen = rng.random(len(places)) < self.mask_fraction
            if not is_chosen.any():
                is_chosen[rng.integers(len(places))] = True
            chosen = places[is_chosen]
            target[i, chosen] = tokens[i, chosen]
            luck = rng.random(len(chosen))
            random_pieces = rng.choice(vocabulary.pieces, len(chosen))
            tokens[i, chosen[luck < 0.8]] = vocabulary.mask
            is_random = (luck >= 0.8) & (luck < 0.9)
            tokens[i, chosen[is_random]] = random_pieces[is_random]
        corrupted = Encodings(tokens, encodings.padding, encodings.is_word)
        return corrupted, torch.from_numpy(target)

    def loss(
        self,
        model: VisionLanguageModel,
        encoded: Encoded,
        inputs: Inputs,  # noqa: ARG002
        target: Tensor,
    ) -> Tensor:
        return mean_token_loss(model, encoded.text, target)
