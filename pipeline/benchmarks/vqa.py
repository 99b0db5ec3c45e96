"""The visual question answering benchmark: a known answer to a question about a picture."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, PositiveInt

from pipeline.benchmarks.base import Benchmark, Evaluation, ResultRow, dtype_of, texts_of
from pipeline.benchmarks.vqa_accuracy import vqa_accuracy
from pipeline.config import Config
from pipeline.data.load.loader import Batch, eval_batches
from pipeline.data.read.dataset import Split
from pipeline.data.sample import Question
from pipeline.data.text.vocabulary import answer_vocabulary
from pipeline.errors import ModelError
from pipeline.models.base import VisionLanguageModel
from pipeline.models.inputs import Inputs
from pipeline.objectives.answer import AnswerConfig
from pipeline.objectives.base import Vocabulary
from pipeline.objectives.stream import encode_texts, make_inputs, moved, own_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class VqaConfig(Config):
    """Which answers a model can give, and how it is fine-tuned to choose among them.

    The field's vocabulary for VQA v2 is 3,129 answers, those of nine questions or more.
    """

    max_answers: PositiveInt = Field(
        default=3129,
        description="the commonest answers that a model can give; 3129 are VQA v2's of nine "
        "questions or more",
    )
    min_count: PositiveInt = Field(
        default=1,
        description="the fewest questions of the training split with an answer as their commonest",
    )
    max_tokens: int = Field(
        default=24, ge=4, description="the longest question, with [CLS], [MASK] and [SEP]"
    )
    answer: AnswerConfig = Field(
        default=AnswerConfig(), description="the objective that answers are fine-tuned with"
    )

    def build(self) -> "Vqa":
        return Vqa(self)


class Vqa(Benchmark[list[Question]]):
    """VQA v2 and every data set in its form."""

    name = "vqa"
    kind = "questions"

    def __init__(self, config: VqaConfig) -> None:
        self.config = config
        self.max_tokens = config.max_tokens

    def objectives(self) -> dict[str, dict[str, Any]]:
        return {"answer": self.config.answer.model_dump(mode="json")}

    def answers(self, split: Split) -> list[str]:
        """Returns the answers a model of this training split shall know, commonest first."""
        return answer_vocabulary(
            self.references(split), self.config.max_answers, self.config.min_count
        )

    def batches(
        self, split: Split, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        return eval_batches(split, "questions", batch_size, rank, world_size)

    def inputs(
        self, tokenizer: "PreTrainedTokenizerFast", batch: Batch, blind_dim: int | None = None
    ) -> Inputs:
        encodings = encode_texts(
            own_texts(batch, "questions"),
            "questions",
            tokenizer,
            Vocabulary.of(tokenizer),
            self.max_tokens,
        )
        return make_inputs(encodings, batch.features, blind_dim)

    def predict(
        self,
        model: VisionLanguageModel,
        tokenizer: "PreTrainedTokenizerFast",
        answers: Sequence[str],
        batches: Iterable[Batch],
        device: torch.device | str = "cpu",
        blind: bool = False,
    ) -> list[ResultRow]:
        return [
            {"question_id": question_id, "answer": ranked[0][0]}
            for question_id, ranked in self.rank(
                model, tokenizer, answers, batches, device, blind, num_answers=1
            )
        ]

    @torch.inference_mode()
    def rank(
        self,
        model: VisionLanguageModel,
        tokenizer: "PreTrainedTokenizerFast",
        answers: Sequence[str],
        batches: Iterable[Batch],
        device: torch.device | str = "cpu",
        blind: bool = False,
        num_answers: int = 5,
    ) -> list[tuple[int | str, list[tuple[str, float]]]]:
        """Returns for each question its id and its likeliest answers, each with its probability.

        Probabilities are of each answer by itself, as it was trained: they do not sum to 1.
        """
        assert not model.training, "call eval() first: dropout would change the answers"
        if len(answers) != model.config.num_answers:
            raise ModelError(
                f"{len(answers)} answers are given, but the model has "
                f"num_answers={model.config.num_answers}"
            )
        blind_dim = model.config.feature_dim if blind else None
        ranked: list[tuple[int | str, list[tuple[str, float]]]] = []
        for batch in batches:
            inputs = moved(
                self.inputs(tokenizer, batch, blind_dim), torch.device(device), dtype_of(model)
            )
            logits = model.answer_logits(model.encode(inputs), inputs).float()
            best = logits.sigmoid().topk(min(num_answers, len(answers)))
            rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            for texts, index, (columns, probabilities) in zip(
                batch.texts, batch.text_index, rows, strict=True
            ):
                named = [answers[column] for column in columns]
                question_id = texts.questions[index].question_id
                ranked.append((question_id, list(zip(named, probabilities, strict=True))))
        return ranked

    def references(self, split: Split) -> list[Question]:
        return [question for texts in texts_of(split) for question in texts.questions]

    def evaluate(self, results: Sequence[ResultRow], references: list[Question]) -> Evaluation:
        """Metrics are percentages, as the official evaluator prints them."""
        accuracy = vqa_accuracy(results, references)
        by_type = {name: value for name, value in accuracy.per_answer_type.items() if name}
        return Evaluation(
            metrics={
                "vqa/accuracy": accuracy.overall,
                **{
                    f"vqa/accuracy/{name.replace('/', '-')}": value
                    for name, value in sorted(by_type.items())
                },
            },
            scores={question: value / 100 for question, value in accuracy.per_question.items()},
            details={
                "accuracy by answer type": by_type,
                "accuracy by question type": {
                    name: value for name, value in accuracy.per_question_type.items() if name
                },
            },
        )
