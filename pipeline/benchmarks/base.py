"""The interface of a benchmark: model inputs, predictions, and their score."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch

from pipeline.data.load.loader import Batch
from pipeline.data.read.dataset import Split, TextKind
from pipeline.data.sample import Texts
from pipeline.models.base import VisionLanguageModel
from pipeline.models.inputs import Inputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROWS_AT_ONCE = 1000  # texts read in one go

ResultRow = dict[str, Any]
ReferencesT = TypeVar("ReferencesT")


@dataclass(frozen=True)
class Evaluation:
    """The scores of one set of results. Ids are those of the result rows."""

    metrics: Mapping[str, float]  # "<benchmark>/<metric>", in the official unit
    scores: Mapping[int | str, float]  # of each result: VQA accuracy, 0 to 1, or CIDEr
    details: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # tables by name
    absent: Mapping[str, str] = field(default_factory=dict)  # metrics not computed, and why


class Benchmark(ABC, Generic[ReferencesT]):
    """One benchmark with its settings. Results are rows of the official submission form."""

    name: ClassVar[str]
    kind: ClassVar[TextKind]  # the texts that a split must have
    max_tokens: int  # of one text, special tokens counted

    @abstractmethod
    def objectives(self) -> dict[str, dict[str, Any]]:
        """Returns the settings, by name, of the objectives that train a model for it."""

    @abstractmethod
    def batches(
        self, split: Split, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """Yields each thing to predict exactly once over all ranks, in row order."""

    @abstractmethod
    def inputs(
        self, tokenizer: "PreTrainedTokenizerFast", batch: Batch, blind_dim: int | None = None
    ) -> Inputs:
        """Returns what the model is given; one of `blind_dim` is given no image."""

    @abstractmethod
    def predict(
        self,
        model: VisionLanguageModel,
        tokenizer: "PreTrainedTokenizerFast",
        answers: Sequence[str],
        batches: Iterable[Batch],
        device: torch.device | str = "cpu",
        blind: bool = False,
    ) -> list[ResultRow]:
        """Returns a result row for each example, in order. The model is on the device, in eval().

        A blind one needs no features in its batches. A prediction does not depend on the batch that
        it is made in.
        """

    @abstractmethod
    def references(self, split: Split) -> ReferencesT:
        """Returns what the results for a split are scored against."""

    @abstractmethod
    def evaluate(self, results: Sequence[ResultRow], references: ReferencesT) -> Evaluation:
        """Scores results; raises MetricError unless each reference has exactly one."""


def results_json(results: Sequence[ResultRow]) -> bytes:
    """Returns the file that the official evaluators and servers read."""
    return json.dumps(results, ensure_ascii=False).encode()


def texts_of(split: Split) -> Iterator[Texts]:
    """Yields the texts of all rows of a split, in order."""
    for start in range(0, split.num_samples, ROWS_AT_ONCE):
        yield from split.texts(range(start, min(start + ROWS_AT_ONCE, split.num_samples)))


def dtype_of(model: VisionLanguageModel) -> torch.dtype:
    """Returns the precision of a model's weights."""
    return next(model.parameters()).dtype
