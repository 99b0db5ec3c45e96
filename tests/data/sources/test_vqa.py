import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.manifest.manifest import Manifest
from pipeline.data.sources.base import Record, Source, accounted
from pipeline.errors import ConfigError, SourceError
from tests.data.sources.built import build, draw, fingerprints, ingested, listed, reason, record
from tests.excerpts import EXCERPTS


def question(number: int, image: int, words: str = "what?") -> dict[str, Any]:
    return {"question_id": number, "image_id": image, "question": words}


def annotation(number: int, image: int, *answers: str) -> dict[str, Any]:
    given = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": index + 1}
        for index, answer in enumerate(answers)
    ]
    return {
        "question_id": number,
        "image_id": image,
        "question_type": "what",
        "answer_type": "other",
        "multiple_choice_answer": answers[0],
        "answers": given,
    }


def write(
    folder: Path, questions: list[dict[str, Any]], annotations: list[dict[str, Any]]
) -> dict[str, str]:
    (folder / "q.json").write_text(json.dumps({"questions": questions}))
    (folder / "a.json").write_text(json.dumps({"annotations": annotations}))
    return {
        "images": str(folder),
        "questions": str(folder / "q.json"),
        "annotations": str(folder / "a.json"),
    }


def test_the_official_excerpt_has_48_samples_and_ten_answers_a_question(
    shared_data: Path, tmp_path: Path
) -> None:
    folder = shared_data / "vqa_v2" / "with_images"
    source = build(
        "vqa",
        images=str(folder / "train2014"),
        questions=str(folder / "v2_OpenEnded_mscoco_train2014_questions.json"),
        annotations=str(folder / "v2_mscoco_train2014_annotations.json"),
    )
    report = ingested(source, tmp_path)
    assert (report.num_live, report.rejects) == (48, {})
    samples = Manifest.open(str(tmp_path / "dataset")).samples()
    assert sum(samples["num_questions"].to_pylist()) == 76
    assert_as_annotated(source, folder)
    assert record(source, "000000000025").image.endswith("COCO_train2014_000000000025.jpg")


def test_an_excerpt_of_the_official_files_has_ten_answers_a_question(tmp_path: Path) -> None:
    questions = EXCERPTS / "v2_OpenEnded_mscoco_train2014_questions.json"
    asked = json.loads(questions.read_text())["questions"]
    names = {f"COCO_train2014_{question['image_id']:012d}.jpg" for question in asked}
    draw(*(tmp_path / "images" / name for name in sorted(names)))
    source = build(
        "vqa",
        images=str(tmp_path / "images"),
        questions=str(questions),
        annotations=str(EXCERPTS / "v2_mscoco_train2014_annotations.json"),
    )
    report = ingested(source, tmp_path)
    assert (report.num_live, report.rejects) == (12, {})
    assert_as_annotated(source, EXCERPTS)


def assert_as_annotated(source: Source, folder: Path) -> None:
    official = json.loads((folder / "v2_mscoco_train2014_annotations.json").read_text())
    by_id = {entry["question_id"]: entry for entry in official["annotations"]}
    for entry in source.records():
        for found in entry.texts.decode().questions:  # type: ignore[union-attr]
            expected = by_id.pop(found.question_id)
            answers = tuple(answer["answer"] for answer in expected["answers"])
            assert (len(found.answers), found.answers) == (10, answers)
            assert found.question_type == expected["question_type"]
            assert found.answer_type == expected["answer_type"]
    assert not by_id


def test_the_packed_files_have_19881_questions_about_13048_images(shared_data: Path) -> None:
    folder = shared_data / "vqa_v2"
    source = build(
        "vqa",
        images=str(folder / "with_images" / "train2014"),
        questions=str(folder / "v2_OpenEnded_mscoco_train2014_questions.json.gz"),
        annotations=str(folder / "v2_mscoco_train2014_annotations.json.gz"),
    )
    counts: Counter[str] = Counter()
    for entry in source.records():
        found = entry if isinstance(entry, Record) else entry.remains
        assert found is not None
        texts = found.texts.decode()
        counts["questions"] += len(texts.questions)
        counts["answers"] += sum(len(asked.answers) for asked in texts.questions)
        counts[reason(entry)] += 1
    assert counts == {
        "questions": 19881,
        "answers": 198810,
        "missing-image": 13048 - 48,
        "live": 48,
    }


def test_daquar_reads_as_vqa(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "daquar"
    splits = {"train": "train", "validation": "val"}
    source = build(
        "vqa",
        images=str(folder / "images"),
        questions={
            split: str(folder / f"v2_OpenEnded_daquar_{name}_questions.json")
            for split, name in splits.items()
        },
        annotations={
            split: str(folder / f"v2_daquar_{name}_annotations.json.gz")
            for split, name in splits.items()
        },
    )
    report = ingested(source, tmp_path)
    assert (report.num_live, report.rejects) == (899, {})
    samples = Manifest.open(str(tmp_path / "dataset")).samples()
    counts: Counter[str] = Counter()
    for row in samples.select(["split", "num_questions"]).to_pylist():
        counts[row["split"]] += row["num_questions"]
        counts[f"{row['split']} images"] += 1
    assert counts == {
        "train": 6795,
        "train images": 794,
        "validation": 957,
        "validation images": 105,
    }
    assert record(source, "000000000003").image.endswith("/image3.jpg")


def test_annotations_without_types_are_an_error_that_names_them(shared_data: Path) -> None:
    folder = shared_data / "vqa_v2" / "header_excerpt"
    source = build(
        "vqa",
        images=str(folder / "train2014"),
        questions=str(folder / "v2_OpenEnded_mscoco_train2014_questions.json"),
        annotations=str(folder / "v2_mscoco_train2014_annotations.json"),
    )
    with pytest.raises(
        SourceError,
        match=r"v2_mscoco_train2014_annotations.json: annotations\[0\]: expected the fields "
        r"'image_id', 'question_type', 'answer_type', found 'question_id', 'answers'. "
        r"Is it a VQA v2 annotations file",
    ):
        listed(source)


def test_test_questions_have_no_answers(shared_data: Path) -> None:
    folder = shared_data / "vqa_v2" / "header_excerpt"
    source = build(
        "vqa",
        images=str(shared_data / "coco" / "train2017"),
        questions=str(folder / "v2_OpenEnded_mscoco_train2014_questions.json"),
    )
    (entry,) = source.records()
    assert reason(entry) == "missing-image"
    assert [asked.answers for asked in entry.remains.texts.decode().questions] == [(), (), ()]  # type: ignore[union-attr]


def test_each_fault_has_its_reason(tmp_path: Path) -> None:
    draw(*(tmp_path / f"{number:012d}.png" for number in (1, 2, 4)))
    settings = write(
        tmp_path,
        [question(10, 1), question(11, 1, "why?"), question(20, 2), question(30, 3)],
        [annotation(10, 1, "a", "b"), annotation(30, 3, "c"), annotation(40, 4, "d"),
         annotation(41, 1, "e")],
    )  # fmt: skip
    source = build("vqa", **settings)
    entries = listed(source)
    assert {key: reason(entry) for key, entry in entries.items()} == {
        "000000000001": "live",
        "000000000002": "no-answers",
        "000000000003": "missing-image",
        "000000000004-unknown-questions": "unknown-question",
        "000000000001-unknown-questions": "unknown-question",
    }
    found = record(source, "000000000001")
    assert [asked.answers for asked in found.texts.decode().questions] == [("a", "b")]
    assert found.detail == "1 questions without answers dropped"
    assert found.suffix == "png"
    assert "such as 41" in entries["000000000001-unknown-questions"].detail


def test_an_edited_answer_changes_the_texts_half_of_one_fingerprint(tmp_path: Path) -> None:
    draw(tmp_path / "1.jpg", tmp_path / "2.jpg")
    asked = [question(10, 1), question(20, 2)]
    before = listed(build("vqa", **write(tmp_path, asked, [annotation(10, 1, "a")] * 1
                                         + [annotation(20, 2, "b")])))  # fmt: skip
    after = listed(
        build("vqa", **write(tmp_path, asked, [annotation(10, 1, "a"), annotation(20, 2, "c")]))
    )
    changed = [key for key in before if fingerprints(before[key]) != fingerprints(after[key])]
    assert changed == ["000000000002"]
    images = [entries["000000000002"].image_fingerprint for entries in (before, after)]
    assert images[0] == images[1]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"annotations": []}', "expected a list 'questions'; the file has the keys 'annotations'"),
        ('{"questions": [{"image_id": 1}]}', r"questions\[0\]: expected a field 'question_id'"),
        ('{"questions": [5]}', r"questions\[0\]: expected an object, found 5"),
        (
            '{"questions": [{"image_id": 1, "question_id": 2, "question": null}]}',
            "'question': expected a string, found None",
        ),
    ],
)
def test_questions_of_another_shape_are_named(tmp_path: Path, text: str, match: str) -> None:
    settings = write(tmp_path, [], [])
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(SourceError, match=match):
        listed(build("vqa", **settings))


def test_of_two_annotations_of_one_question_the_first_holds(tmp_path: Path) -> None:
    draw(tmp_path / "1.jpg")
    settings = write(tmp_path, [question(10, 1)], [annotation(10, 1, "a"), annotation(10, 1, "b")])
    entries = list(build("vqa", **settings).records())
    assert [reason(entry) for entry in entries] == ["live", "malformed-record"]
    assert "annotations[1]: 'question_id': question 10 is answered twice" in entries[1].detail


def test_of_two_questions_of_one_id_the_first_holds(tmp_path: Path) -> None:
    draw(tmp_path / "1.jpg")
    asked = [question(10, 1), question(11, 1), question(10, 1)]
    settings = write(tmp_path, asked, [annotation(10, 1, "a"), annotation(11, 1, "b")])
    entries = list(accounted(build("vqa", **settings)))
    assert [reason(entry) for entry in entries] == ["live", "malformed-record"]
    assert isinstance(entries[0], Record)
    assert [found.question_id for found in entries[0].texts.decode().questions] == [10, 11]
    assert "questions[2]: 'question_id': question 10 is asked twice" in entries[1].detail


def test_a_faulty_question_or_annotation_costs_itself(tmp_path: Path) -> None:
    draw(tmp_path / "1.jpg", tmp_path / "2.jpg")
    questions = [question(10, 1), question(11, 1) | {"question": 5}, question(20, 2)]
    answers = [annotation(10, 1, "a"), annotation(20, 2, "b") | {"answers": [{"answer": None}]}]
    settings = write(tmp_path, questions, [*answers, annotation(30, 1, "c") | {"question_id": []}])
    entries = list(build("vqa", **settings).records())
    assert Counter(map(reason, entries)) == {"live": 1, "no-answers": 1, "malformed-record": 3}
    places = [e.detail.partition(": ")[2] for e in entries if reason(e) == "malformed-record"]
    assert [place.partition(":")[0] for place in places] == [
        "questions[1]",
        "annotations[2]",
        "annotations[1].answers[0]",
    ]


def test_packed_files_cut_short_are_named(tmp_path: Path) -> None:
    settings = write(tmp_path, [question(1, 1)], [])
    (tmp_path / "q.json").write_bytes(gzip.compress(b'{"questions": []}')[:-9])
    with pytest.raises(SourceError, match=r"q\.json: cannot be unpacked"):
        listed(build("vqa", **settings))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"questions": {"train": "q"}, "annotations": "a"}, "needs them too"),
        ({"questions": {"train": "q"}, "annotations": {"test": "a"}}, "questions has only"),
        ({"questions": "q", "annotations": {"train": "a"}}, "questions is one file"),
        ({"questions": {"train": "q"}, "validation_fraction": 0.5}, "leave one of them out"),
    ],
)
def test_settings_that_disagree_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build("vqa", images="i", **settings)
