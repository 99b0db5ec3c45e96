"""The interface of an objective: a target from a micro-batch's texts, a loss from a model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from pipeline.data.load.loader import Batch
from pipeline.data.read.dataset import Dataset, TextKind
from pipeline.models.base import MaskKind, VisionLanguageModel
from pipeline.models.inputs import Encoded, Inputs
from pipeline.objectives.turns import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100  # at positions of a target that no loss is taken of

ShownKind = Literal["captions", "questions"]  # the texts that can be shown beside an image


@dataclass(frozen=True)
class Stream:
    """The texts a forward pass reads and how it reads them; objectives of one stream share it."""

    kind: TextKind
    mask: MaskKind
    is_intact: bool = False  # nothing is hidden or exchanged in it

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.mask}{'-intact' if self.is_intact else ''}"


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
    # (B, T): the number of the word that a piece is of, ascending; None for a text begun only
    words: npt.NDArray[np.int64] | None = None


class Objective(ABC):
    """One loss, with its corruption of text and image, its targets and its metric.

    Randomness comes from `batch.rng` only, and a sample's target and loss do not depend on the
    samples beside it, so that neither ranks nor micro-batches change what is learned. A target is
    a Tensor, or a dataclass of some with their `to(device)`.

    Its life: `check` and `open` before anything starts and `attach` when the module is built; then
    for each micro-batch `draw`, `choose_texts`, `prepare` and `hide` while it is collated, and
    `loss`. What `draw` returns is handed to the next three.
    """

    name: str
    stream: Stream
    metric_name: ClassVar[str]
    needs_distractors: ClassVar[bool] = False
    needs_regions: ClassVar[bool] = False
    needs_global_batch: ClassVar[bool] = False  # all ranks' samples of a step in one pass
    needs_attention: bool = False  # the model's attention maps
    matched_only: bool = False  # a sample shown with another image's text costs nothing
    turns: Turns | None = None  # the steps that train it; None: all

    def __init__(self, weight: float) -> None:
        self.weight = weight  # of this loss in the sum of all

    def is_due(self, seed: int, step: int) -> bool:
        """Whether a step trains it: the same on every rank."""
        return self.turns is None or self.turns.has(seed, step)

    def refusal(self, family: type[VisionLanguageModel]) -> str | None:
        """Says why models of a family cannot be trained on it; None: they can."""
        if self.stream.mask not in family.masks:
            return f"it needs a family that can write text, which {family.__name__} cannot"
        if self.needs_regions and (
            family.region_predictions is VisionLanguageModel.region_predictions
        ):
            return f"it needs a family with heads for regions, which {family.__name__} has not"
        return None

    def check(  # noqa: B027  most go with any
        self, tokenizer: "PreTrainedTokenizerFast", answers: Sequence[str]
    ) -> None:
        """Raises ConfigError if it cannot go with this tokenizer and these answers."""

    def open(self, dataset: Dataset, split: str) -> None:  # noqa: B027  most read nothing
        """Opens what it reads of a split beside the batches."""

    def attach(self, model: VisionLanguageModel) -> nn.Module | None:  # noqa: ARG002
        """Returns what is learned beside this model, if anything.

        Raises ModelError if such a model cannot be trained on it.
        """
        return None

    def draw(self, batch: Batch) -> Any:  # noqa: ARG002
        """Returns what is drawn once for a batch, because more than one of the next needs it."""
        return None

    def choose_texts(self, texts: list[str], drawn: Any) -> list[str]:  # noqa: ARG002
        """Returns the text shown with each image (B,), before tokens are made of it."""
        return texts

    @abstractmethod
    def prepare(
        self, batch: Batch, encodings: Encodings, vocabulary: Vocabulary, drawn: Any
    ) -> tuple[Encodings, Any]:
        """Returns the sequences as the model shall see them, and the target, for B samples."""

    def select(self, target: Any, samples: Tensor, num_tokens: int) -> Any:  # noqa: ARG002
        """Returns the target of these samples (N,), the longest of which has so many tokens."""
        return target[samples]

    def hide(self, batch: Batch, inputs: Inputs, drawn: Any) -> Inputs:  # noqa: ARG002
        """Returns the inputs with the regions hidden that the model shall not see."""
        return inputs

    @abstractmethod
    def loss(
        self, model: VisionLanguageModel, encoded: Encoded, inputs: Inputs, target: Any
    ) -> Tensor:
        """Returns each sample's loss, float32 (B,); the mean over a batch is the caller's."""

    @abstractmethod
    def metric(
        self, model: VisionLanguageModel, encoded: Encoded, inputs: Inputs, target: Any
    ) -> Tensor:
        """Returns how good each sample's prediction is, `metric_name`, at best 1: float32 (B,).

        NaN where a sample has nothing to predict.
        """


def named(name: str, kind: TextKind) -> str:
    """Returns what an objective is called where it reads this kind of text."""
    return name if kind == "captions" else f"{name}-{kind}"
