"""Question answering in pretraining: one of people's answers, drawn anew each time."""

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pipeline.config import Config
from pipeline.data.load.loader import Batch
from pipeline.errors import ConfigError
from pipeline.models.base import VisionLanguageModel
from pipeline.models.inputs import Encoded, Inputs
from pipeline.objectives.base import IGNORED, Encodings, Objective, Stream, Vocabulary
from pipeline.objectives.consensus import consensus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SALT = zlib.crc32(b"qa")


class QaConfig(Config):
    """Cross-entropy over the answer vocabulary."""

    weight: float = Field(
        default=1.0, gt=0, description="factor of its loss in the sum of the objectives'"
    )

    def build(self) -> "list[QuestionAnswering]":
        return [QuestionAnswering(self)]


class QuestionAnswering(Objective):
    """LXMERT's image question answering (arXiv:1908.07490, 3.1.3; its code's sampled label).

    The label is drawn from the known answers in proportion to their soft scores. A question
    without a known answer, or one of another image (see itm), costs nothing; the paper's
    vocabulary has 9500 answers of five data sets.
    """

    name = "qa"
    stream = Stream("questions", "full")
    metric_name = "accuracy"
    matched_only = True

    def __init__(self, config: QaConfig) -> None:
        super().__init__(config.weight)

    def check(self, tokenizer: "PreTrainedTokenizerFast", answers: Sequence[str]) -> None:  # noqa: ARG002
        if not answers:
            raise ConfigError("objectives.qa: there is no answer to learn; it needs a vocabulary")

    def prepare(
        self,
        batch: Batch,
        encodings: Encodings,
        vocabulary: Vocabulary,
        drawn: None,  # noqa: ARG002
    ) -> tuple[Encodings, Tensor]:
        """The target (B,) is the column of the drawn answer, IGNORED if none is known."""
        target = torch.full((len(batch.keys),), IGNORED)
        for i, (texts, index) in enumerate(zip(batch.texts, batch.text_index, strict=True)):
            given = texts.questions[index].answers
            known = sorted(set(given) & vocabulary.answers.keys())
            scores = np.array([consensus(answer, given) for answer in known])
            if scores.sum() > 0:
                label = batch.rng(i, _SALT).choice(len(known), p=scores / scores.sum())
                target[i] = vocabulary.answers[known[label]]
        return encodings, target

    def loss(
        self, model: VisionLanguageModel, encoded: Encoded, inputs: Inputs, target: Tensor
    ) -> Tensor:
        logits = model.answer_logits(encoded, inputs).float()
        return F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="none")

    def metric(
        self, model: VisionLanguageModel, encoded: Encoded, inputs: Inputs, target: Tensor
    ) -> Tensor:
        right = (model.answer_logits(encoded, inputs).argmax(1) == target).float()
        return right.masked_fill(target == IGNORED, torch.nan)
