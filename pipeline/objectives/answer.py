"""Question answering as classification: each known answer scored by how many people gave it."""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pipeline.config import Config
from pipeline.data.load.loader import Batch
from pipeline.models.base import VisionLanguageModel
from pipeline.models.inputs import Encoded, Inputs
from pipeline.objectives.base import Encodings, Objective, Stream, Vocabulary
from pipeline.objectives.consensus import consensus


class AnswerConfig(Config):
    """Binary cross-entropy against soft scores."""

    weight: float = Field(
        default=1.0, gt=0, description="factor of its loss in the sum of the objectives'"
    )

    def build(self) -> "list[Answering]":
        return [Answering(self)]


class Answering(Objective):
    """Binary cross-entropy of every answer, summed over answers (arXiv:1708.02711, 3.4).

    The soft score of an answer is its official accuracy among the answers as people wrote them,
    which for ten people is the 0.3, 0.6, 0.9, 1 of that paper, LXMERT and ViLBERT. VisualBERT's
    published fine-tuning instead takes a Kullback-Leibler divergence. Answers that are not in the
    vocabulary ask for nothing.
    """

    name = "answer"
    stream = Stream("questions", "full")
    metric_name = "accuracy"
    matched_only = True

    def __init__(self, config: AnswerConfig) -> None:
        super().__init__(config.weight)

    def prepare(
        self,
        batch: Batch,
        encodings: Encodings,
        vocabulary: Vocabulary,
        drawn: None,  # noqa: ARG002
    ) -> tuple[Encodings, Tensor]:
        """The target is (B, A), a score from 0 to 1 for each answer."""
        target = torch.zeros(len(batch.keys), len(vocabulary.answers))
        for i, (texts, index) in enumerate(zip(batch.texts, batch.text_index, strict=True)):
            given = texts.questions[index].answers
            for answer in set(given) & vocabulary.answers.keys():
                target[i, vocabulary.answers[answer]] = consensus(answer, given)
        return encodings, target

    def loss(
        self, model: VisionLanguageModel, encoded: Encoded, inputs: Inputs, target: Tensor
    ) -> Tensor:
        logits = model.answer_logits(encoded, inputs).float()
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1)

    def metric(
        self, model: VisionLanguageModel, encoded: Encoded, inputs: Inputs, target: Tensor
    ) -> Tensor:
        best = model.answer_logits(encoded, inputs).argmax(1, keepdim=True)
        return target.gather(1, best).squeeze(1)
