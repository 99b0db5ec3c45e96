"""Masked language modelling: hidden words told from the others and the picture."""

import zlib

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from pipeline.config import Config
from pipeline.data.load.loader import Batch
from pipeline.objectives.base import (
    IGNORED,
    Encodings,
    ShownKind,
    Stream,
    Vocabulary,
    named,
)
from pipeline.objectives.token_objective import TokenObjective

_SALT = zlib.crc32(b"mlm")


class MlmConfig(Config):
    """BERT's corruption; the defaults are those of VisualBERT, LXMERT, ViLBERT and UNITER."""

    weight: float = Field(
        default=1.0, gt=0, description="factor of its loss in the sum of the objectives'"
    )
    texts: tuple[ShownKind, ...] = Field(
        default=("captions",), min_length=1, description="the texts that are shown beside an image"
    )
    mask_fraction: float = Field(
        default=0.15,
        gt=0,
        lt=1,
        description="the share of word pieces that are chosen: 80 % hidden, 10 % exchanged, 10 "
        "% kept",
    )
    whole_words: bool = Field(
        default=False, description="whether words are chosen, and all pieces of each hidden"
    )
    matched_only: bool = Field(
        default=False,
        description="whether mismatched pairs cost nothing, as in ViLBERT and VOLTA; the mean "
        "is still over all pairs, so a weight of 1 / (1 - itm.mismatch_probability) equals "
        "their mean over matched ones",
    )

    def build(self) -> "list[MaskedLanguageModelling]":
        return [MaskedLanguageModelling(self, kind) for kind in dict.fromkeys(self.texts)]


class MaskedLanguageModelling(TokenObjective):
    """BERT's objective (arXiv:1810.04805, 3.1) with the picture beside the text.

    Of the chosen pieces 80 % read [MASK], 10 % a random piece, 10 % themselves. As in UNITER at
    least one piece of a text is chosen. Special tokens are neither chosen nor put in. With whole
    words, a word's pieces are chosen together, and each then has its own draw, as in BERT's code.
    """

    def __init__(self, config: MlmConfig, kind: ShownKind = "captions") -> None:
        super().__init__(config.weight)
        self.name = named("mlm", kind)
        self.stream = Stream(kind, "full")
        self.matched_only = config.matched_only
        self.mask_fraction = config.mask_fraction
        self.whole_words = config.whole_words

    def prepare(
        self,
        batch: Batch,
        encodings: Encodings,
        vocabulary: Vocabulary,
        drawn: None,  # noqa: ARG002
    ) -> tuple[Encodings, Tensor]:
        """Returns the corrupted sequences and the true piece (B, T) at the chosen positions."""
        tokens = encodings.tokens.copy()
        target = np.full_like(tokens, IGNORED)
        for i, is_word in enumerate(encodings.is_word):
            positions = np.flatnonzero(is_word)
            if not len(positions):
                continue
            rng = batch.rng(i, _SALT)
            chosen = positions[self._choose(rng, self._units(encodings, i, positions))]
            target[i, chosen] = tokens[i, chosen]
            draws = rng.random(len(chosen))
            random_pieces = rng.choice(vocabulary.pieces, len(chosen))
            tokens[i, chosen[draws < 0.8]] = vocabulary.mask
            is_random = (draws >= 0.8) & (draws < 0.9)
            tokens[i, chosen[is_random]] = random_pieces[is_random]
        corrupted = Encodings(tokens, encodings.padding, encodings.is_word, encodings.words)
        return corrupted, torch.from_numpy(target)

    def _units(
        self, encodings: Encodings, i: int, positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Returns the number, from 0, of the unit that each piece of a text is chosen with."""
        if not self.whole_words:
            return np.arange(len(positions))
        assert encodings.words is not None, "texts must be encoded whole"
        return np.unique(encodings.words[i, positions], return_inverse=True)[1]

    def _choose(
        self, rng: np.random.Generator, units: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        num_units = int(units.max()) + 1
        is_chosen = rng.random(num_units) < self.mask_fraction
        if not is_chosen.any():
            is_chosen[rng.integers(num_units)] = True
        return is_chosen[units]
