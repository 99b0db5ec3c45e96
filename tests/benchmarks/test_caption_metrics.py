"""The caption scores against the official evaluator's figures."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.benchmarks.caption_metrics import caption_scores, unavailable
from pipeline.errors import MetricError
from tests.excerpts import read_excerpt

OFFICIAL_NAMES = {
    "bleu1": "Bleu_1",
    "bleu2": "Bleu_2",
    "bleu3": "Bleu_3",
    "bleu4": "Bleu_4",
    "rouge-l": "ROUGE_L",
    "cider": "CIDEr",
    "meteor": "METEOR",
}


def read_references(file: Path) -> dict[int | str, list[str]]:
    references: dict[int | str, list[str]] = {}
    for annotation in json.loads(file.read_text())["annotations"]:
        references.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return references


def require_equal_scores(
    results: list[Any],
    references: dict[int | str, list[str]],
    official: dict[str, float],
    per_image: list[Any],
) -> None:
    scores = caption_scores(
        results, {row["image_id"]: references[row["image_id"]] for row in results}
    )

    expected = set(OFFICIAL_NAMES) if shutil.which("java") else set(OFFICIAL_NAMES) - {"meteor"}
    assert set(scores.corpus) == expected
    for ours in expected:
        theirs = OFFICIAL_NAMES[ours]
        assert scores.corpus[ours] == pytest.approx(official[theirs], rel=1e-12), ours
        for image in per_image:
            found = scores.per_image[image["image_id"]][ours]
            assert found == pytest.approx(image[theirs], rel=1e-12, abs=1e-15), (ours, image)
    assert len(per_image) == len(scores.per_image) == len(results)


@pytest.mark.processes
def test_scores_of_an_excerpt_equal_the_official_evaluator() -> None:
    excerpt = read_excerpt("coco-captions")
    references: dict[int | str, list[str]] = {
        int(image): captions for image, captions in excerpt["references"].items()
    }
    require_equal_scores(
        excerpt["results"], references, excerpt["official"], excerpt["official_per_image"]
    )


@pytest.mark.processes
@pytest.mark.parametrize("name", ["human", "shuffled"])
def test_scores_equal_the_official_evaluator(shared_data: Path, name: str) -> None:
    official: Any = json.loads((shared_data / "coco/results/official_scores.json").read_text())
    official = official[name]
    results = json.loads((shared_data / "coco/results" / official["results"]).read_text())
    references = read_references(shared_data / "coco" / official["references"])
    per_image = json.loads(
        (
            shared_data / "coco/results" / official["results"].replace("_results", "_evalImgs")
        ).read_text()
    )

    require_equal_scores(results, references, official["scores"], per_image)
    assert len(results) == official["images"]


WITHOUT_JAVA: Any = ("bleu", "rouge-l", "cider")


def test_results_may_come_in_any_order() -> None:
    references: Any = {1: ["a red dog runs", "a dog"], "two": ["a cat"]}
    rows: Any = [
        {"image_id": 1, "caption": "a dog runs"},
        {"image_id": "two", "caption": "the cat"},
    ]
    assert caption_scores(rows, references, WITHOUT_JAVA) == caption_scores(
        rows[::-1], references, WITHOUT_JAVA
    )


def test_an_empty_caption_scores_nothing() -> None:
    references: Any = {1: ["a red dog runs"], 2: ["a cat sits"]}
    rows = [{"image_id": 1, "caption": ""}, {"image_id": 2, "caption": "a cat sits"}]
    scores = caption_scores(rows, references, WITHOUT_JAVA)
    for name, score in scores.per_image[1].items():
        assert score == pytest.approx(0, abs=1e-6), name
    assert scores.corpus["cider"] > 0


def test_meteor_is_absent_with_a_reason_where_java_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.benchmarks.caption_metrics.shutil.which", lambda _: None)
    assert "java" in unavailable(["cider", "meteor"])["meteor"]
    assert unavailable(["cider"]) == {}
    rows = [{"image_id": 1, "caption": "a dog"}]
    assert set(caption_scores(rows, {1: ["a dog"]}, ("cider", "meteor")).corpus) == {"cider"}


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    caption_scores([{"image_id": 1, "caption": "a dog"}], {1: ["a dog"]}, WITHOUT_JAVA)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image_id": 1, "caption": "a"}], "1 image_ids have no result: 2"),
        ([{"image_id": i, "caption": "a"} for i in (1, 2, 3)], "have no references: 3"),
        ([{"image_id": i, "caption": "a"} for i in (1, 2, 2)], "image_id 2 comes twice"),
        ([{"image_id": i, "caption": None} for i in (1, 2)], "row 0"),
        ([{"key": i, "caption": "a"} for i in (1, 2)], "row 0"),
    ],
)
def test_results_that_do_not_pair_with_the_images_are_refused(
    rows: list[dict], message: str
) -> None:
    with pytest.raises(MetricError, match=message):
        caption_scores(rows, {1: ["a"], 2: ["a"]})


@pytest.mark.parametrize("references", [{}, {1: []}, {1: ["..."]}])
def test_references_without_a_word_are_refused(references: dict) -> None:
    rows = [{"image_id": image, "caption": "a"} for image in references]
    with pytest.raises(MetricError):
        caption_scores(rows, references)
