"""Answering questions with a model, end to end on a tiny dataset."""

from typing import Any

import pytest

from pipeline.benchmarks.vqa import Vqa, VqaConfig
from pipeline.data.load.loader import eval_batches
from pipeline.data.read.dataset import Dataset, Split
from pipeline.data.sample import Question
from pipeline.data.text.vocabulary import build_tokenizer
from pipeline.errors import MetricError, ModelError
from pipeline.models.visualbert import VisualBert
from tests.benchmarks.tiny import make_model
from tests.data.tiny_dataset import EXTRACTOR, make_dataset

ANSWERS = ["yes", "no", "cat", "dog", "red"]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    url = str(tmp_path_factory.mktemp("dataset"))
    make_dataset(url, num_samples=11)
    return Dataset.open(url).split("train", EXTRACTOR)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(["question 0 1 2 ?", "caption of"], 60)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> VisualBert:
    return make_model(len(tokenizer), len(ANSWERS))


def test_every_question_is_answered_once_in_any_batch_and_on_any_number_of_ranks(
    split: Split, tokenizer: Any, model: VisualBert
) -> None:
    vqa = VqaConfig().build()
    one = vqa.predict(model, tokenizer, ANSWERS, vqa.batches(split, 1))
    assert one == vqa.predict(model, tokenizer, ANSWERS, vqa.batches(split, 64))
    ranks = [
        vqa.predict(model, tokenizer, ANSWERS, vqa.batches(split, 2, rank, 3)) for rank in range(3)
    ]
    assert one == ranks[0] + ranks[1] + ranks[2]
    assert [row["question_id"] for row in one] == [q.question_id for q in vqa.references(split)]
    assert all(set(row) == {"question_id", "answer"} and row["answer"] in ANSWERS for row in one)


def test_ranked_answers_begin_with_the_predicted_one(
    split: Split, tokenizer: Any, model: VisualBert
) -> None:
    vqa = Vqa(VqaConfig())
    predicted = vqa.predict(model, tokenizer, ANSWERS, vqa.batches(split, 4))
    ranked = vqa.rank(model, tokenizer, ANSWERS, vqa.batches(split, 3), num_answers=4)
    for row, (question_id, best) in zip(predicted, ranked, strict=True):
        assert row == {"question_id": question_id, "answer": best[0][0]}
        probabilities = [probability for _, probability in best]
        assert probabilities == sorted(probabilities, reverse=True)
        assert len(best) == 4
        assert all(0 < probability < 1 for probability in probabilities)


def test_the_blind_twin_sees_no_image(split: Split, tokenizer: Any) -> None:
    vqa = Vqa(VqaConfig())
    (batch,) = eval_batches(split, "questions", 64)
    assert vqa.inputs(tokenizer, batch).features.shape[1] == 6
    assert vqa.inputs(tokenizer, batch, blind_dim=8).features.shape[1] == 0


def test_answers_are_the_commonest_of_the_split(split: Split) -> None:
    assert Vqa(VqaConfig()).answers(split) == ["yes"]
    assert Vqa(VqaConfig(min_count=1000)).answers(split) == []


def test_another_number_of_answers_than_the_models_is_refused(
    split: Split, tokenizer: Any, model: VisualBert
) -> None:
    vqa = Vqa(VqaConfig())
    with pytest.raises(ModelError, match="2 answers are given, but the model has num_answers=5"):
        vqa.predict(model, tokenizer, ["yes", "no"], vqa.batches(split, 2))


def test_metrics_are_official_percentages_overall_and_by_answer_type() -> None:
    questions = [
        Question(1, "", ("yes",) * 10, "is the", "yes/no"),
        Question(2, "", ("2",) * 3 + ("3",) * 7, "how many", "number"),
        Question("x", "", ("red",), "what colour", ""),
    ]
    rows = [
        {"question_id": question_id, "answer": answer}
        for question_id, answer in ((1, "yes"), (2, "2"), ("x", "blue"))
    ]
    evaluation = Vqa(VqaConfig()).evaluate(rows, questions)
    assert evaluation.metrics == {
        "vqa/accuracy": 63.33,
        "vqa/accuracy/number": 90.0,
        "vqa/accuracy/yes-no": 100.0,
    }
    assert evaluation.scores == {1: 1.0, 2: 0.9, "x": 0.0}
    assert evaluation.details["accuracy by question type"] == {
        "is the": 100.0,
        "how many": 90.0,
        "what colour": 0.0,
    }
    with pytest.raises(MetricError):
        Vqa(VqaConfig()).evaluate(rows[:2], questions)
