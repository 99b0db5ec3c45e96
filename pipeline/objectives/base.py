"""What every objective is: from a micro-batch's texts to a target, and from a model to a loss."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline.data.dataset import TextKind
from pipeline.data.loader import Batch
from pipeline.models.base import MaskKind, VisionLanguageModel
from pipeline.models.inputs import Encoded, Inputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100  # at positions of a target that no loss is taken of


@dataclass(frozen=True)
class Stream:
    """The texts a forward pass reads and how it reads them; objectives of one stream share it."""

    kind: TextKind
    mask: MaskKind

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.mask}"


@dataclass(frozen=True)
class Vocabulary:
    """What objectives know of the tokenizer and of the answers."""

    pad: int
    cls: int
    sep: int
    mask: int
    pieces: npt.NDArray[np.int64]  # ids of all tokens that are not special
    answers: Mapping[str, int]  # answer -> its column in answer_logits

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast", answers: Sequence[str] = ()) -> "Vocabulary":
        """Reads the special tokens of a BERT tokenizer."""
        return cls(
            pad=tokenizer.pad_token_id,
            cls=tokenizer.cls_token_id,
            sep=tokenizer.sep_token_id,
            mask=tokenizer.mask_token_id,
            pieces=np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids),
            answers={answer: column for column, answer in enumerate(answers)},
        )


@dataclass(frozen=True)
class Encodings:
    """The token sequences of a micro-batch: B samples, T tokens of the longest."""

    tokens: npt.NDArray[np.int64]  # (B, T), padded on the right
    padding: npt.NDArray[np.bool_]  # (B, T)
    is_word: npt.NDArray[np.bool_]  # (B, T): a piece of the text, neither special nor padding


class Objective(ABC):
    """One loss, with its corruption of the text and its targets.

    Randomness comes from `batch.rng` only, and a sample's target and loss do not depend on the
    samples beside it, so that neither ranks nor micro-batches change what is learned.
    """

    name: ClassVar[str]
    stream: ClassVar[Stream]
    needs_distractors: ClassVar[bool] = False

    def __init__(self, weight: float) -> None:
        self.weight = weight  # of this loss in the sum of all

    def choose_texts(self, batch: Batch, texts: list[str]) -> list[str]:  # noqa: ARG002
        """Returns the text shown with each image (B,), before tokens are made of it."""
        return texts

    @abstractmethod
    def prepare(
        self, batch: Batch, encodings: Encodings, vocabulary: Vocabulary
    ) -> tuple[Encodings, Tensor]:
        """Returns the sequences as the model shall see them, and the target (B, ...)."""

    @abstractmethod
    def loss(
        self, model: VisionLanguageModel, encoded: Encoded, inputs: Inputs, target: Tensor
    ) -> Tensor:
        """Returns each sample's loss, float32 (B,); the mean over a batch is the caller's."""
