"""Writing captions with a model, end to end on a tiny dataset."""

import json
from typing import Any

import pytest

from pipeline.benchmarks.base import results_json
from pipeline.benchmarks.caption import Caption, CaptionConfig
from pipeline.data.read.dataset import Dataset, Split
from pipeline.data.text.vocabulary import build_tokenizer
from pipeline.errors import ModelError
from pipeline.models.visualbert import VisualBert
from tests.benchmarks.tiny import make_model
from tests.data.tiny_dataset import EXTRACTOR, make_dataset, make_texts


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    url = str(tmp_path_factory.mktemp("dataset"))
    make_dataset(url, num_samples=11)
    return Dataset.open(url).split("train", EXTRACTOR)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(["a man's hat, on 1 of 2 wooden chairs", "caption of"], 90)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> VisualBert:
    return make_model(len(tokenizer))


@pytest.mark.parametrize("beams", [1, 3])
def test_every_captioned_image_gets_one_caption_in_any_batch_and_on_any_number_of_ranks(
    split: Split, tokenizer: Any, model: VisualBert, beams: int
) -> None:
    caption = CaptionConfig(beams=beams, max_tokens=9).build()
    one = caption.predict(model, tokenizer, [], caption.batches(split, 1))
    assert one == caption.predict(model, tokenizer, [], caption.batches(split, 64))
    ranks = [
        caption.predict(model, tokenizer, [], caption.batches(split, 2, rank, 3))
        for rank in range(3)
    ]
    assert one == ranks[0] + ranks[1] + ranks[2]
    captioned = {number for number in range(11) if make_texts(number).captions}
    assert len(one) == len(captioned)
    assert {row["image_id"] for row in one} == captioned == set(caption.references(split))
    assert all(set(row) == {"image_id", "caption"} for row in one)
    assert len({row["caption"] for row in one}) > 1  # the picture is looked at


def test_word_pieces_are_joined_as_people_write(tokenizer: Any) -> None:
    text = "a man's hat, on 1 of 2 wooden chairs"
    pieces = tokenizer(text, add_special_tokens=False).input_ids
    assert (
        tokenizer.decode(pieces, skip_special_tokens=True, clean_up_tokenization_spaces=True)
        == text
    )


def test_the_blind_twin_sees_no_image(split: Split, tokenizer: Any) -> None:
    caption = Caption(CaptionConfig())
    (batch,) = caption.batches(split, 64)
    seeing, blind = (caption.inputs(tokenizer, batch, dim) for dim in (None, 8))
    assert seeing.features.shape[1:] == (6, 8)
    assert blind.features.shape[1:] == (0, 8)
    assert seeing.tokens.tolist() == [[tokenizer.cls_token_id]] * len(batch.keys)


def test_a_family_that_cannot_write_is_refused(tokenizer: Any, split: Split) -> None:
    caption = Caption(CaptionConfig())
    reader: Any = type("Reader", (), {"masks": ("full",)})()
    with pytest.raises(ModelError, match="Reader cannot write text"):
        caption.predict(reader, tokenizer, [], caption.batches(split, 2))


def test_metrics_are_named_and_each_image_has_its_cider() -> None:
    caption = Caption(CaptionConfig(metrics=("bleu", "cider")))
    rows: Any = [{"image_id": 1, "caption": "A red dog."}, {"image_id": "b", "caption": "a cat"}]
    references: Any = {1: ("a red dog runs", "the dog"), "b": ("a grey cat sits",)}
    evaluation = caption.evaluate(rows, references)
    assert set(evaluation.metrics) == {f"caption/bleu{n}" for n in (1, 2, 3, 4)} | {"caption/cider"}
    assert set(evaluation.scores) == {1, "b"}
    assert evaluation.metrics["caption/cider"] == pytest.approx(sum(evaluation.scores.values()) / 2)
    assert evaluation.absent == {}


def test_a_metric_that_cannot_run_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.benchmarks.caption_metrics.shutil.which", lambda _: None)
    caption = Caption(CaptionConfig(metrics=("bleu", "meteor")))
    evaluation = caption.evaluate([{"image_id": 1, "caption": "a cat"}], {1: ("a cat",)})
    assert "java" in evaluation.absent["caption/meteor"]
    assert "caption/meteor" not in evaluation.metrics


def test_results_are_written_in_the_submission_form() -> None:
    rows = [{"image_id": 1, "caption": "a café"}]
    assert json.loads(results_json(rows)) == rows
