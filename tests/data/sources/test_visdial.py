import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.manifest.manifest import Manifest
from pipeline.errors import ConfigError, SourceError
from tests.data.sources.built import build, draw, ingested, listed, reason, reasons, record
from tests.excerpts import EXCERPTS


def turn(**changes: Any) -> dict[str, Any]:
    return {"question": 0, "answer": 2, "answer_options": [1, 2, 0], "gt_index": 1, **changes}


def write(folder: Path, *rounds: dict[str, Any], image_id: int = 9) -> dict[str, str]:
    data = {
        "questions": ["is it red", "is it big"],
        "answers": ["no", "maybe", "yes"],
        "dialogs": [{"image_id": image_id, "caption": "a ball ", "dialog": list(rounds)}],
    }
    (folder / "visdial.json").write_text(json.dumps({"version": "1.0", "data": data}))
    draw(folder / "VisualDialog_val2018_000000000009.jpg")
    return {"images": str(folder), "dialogs": str(folder / "visdial.json")}


def write_dense(folder: Path, *entries: dict[str, Any]) -> dict[str, str]:
    (folder / "dense.json").write_text(json.dumps(entries))
    return {"dense": str(folder / "dense.json")}


@pytest.mark.parametrize("number", [3, 97], ids=["clone", "beside"])
def test_official_dialogs_have_one_judged_round_each(
    number: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = EXCERPTS if number == 3 else request.getfixturevalue("shared_data") / "visdial"
    official = json.loads((folder / "visdial_1.0_val.json").read_text())["data"]
    ids = [dialog["image_id"] for dialog in official["dialogs"]]
    draw(*(tmp_path / "images" / f"VisualDialog_val2018_{image:012d}.jpg" for image in ids))
    source = build(
        "visdial",
        images={"validation": str(tmp_path / "images")},
        dialogs={"validation": str(folder / "visdial_1.0_val.json")},
        dense={"validation": str(folder / "visdial_1.0_val_dense_annotations.json")},
    )
    report = ingested(source, tmp_path)
    assert (report.num_live, report.rejects) == (number, {})
    samples = Manifest.open(str(tmp_path / "dataset")).samples()
    assert sum(samples["num_rounds"].to_pylist()) == 10 * number
    judged = json.loads((folder / "visdial_1.0_val_dense_annotations.json").read_text())
    for entry, dense in zip(source.records(), judged, strict=True):
        (dialog,) = entry.texts.decode().dialogs  # type: ignore[union-attr]
        assert entry.key == f"{dense['image_id']:012d}"
        for place, found in enumerate(dialog.rounds, 1):
            assert len(found.options) == 100
            assert found.options[found.gt_index] == found.answer
            expected = dense["gt_relevance"] if place == dense["round_id"] else []
            assert list(found.relevance) == expected
    first = official["dialogs"][0]
    (dialog,) = record(source, f"{ids[0]:012d}").texts.decode().dialogs
    assert dialog.caption == first["caption"]
    assert dialog.rounds[3].question == official["questions"][first["dialog"][3]["question"]]


def test_dialogs_without_their_photographs_are_97_missing_images(shared_data: Path) -> None:
    source = build(
        "visdial",
        images=str(shared_data / "coco" / "val2017"),
        dialogs=str(shared_data / "visdial" / "visdial_1.0_val.json"),
    )
    assert reasons(source) == {"missing-image": 97}


def test_daquar_reads_as_visdial(shared_data: Path) -> None:
    folder = shared_data / "daquar"
    source = build(
        "visdial",
        images=str(folder / "images"),
        dialogs={
            split: str(folder / f"visdial_1.0_daquar_{split}.json") for split in ("train", "val")
        },
    )
    counts: Counter[str] = Counter()
    for entry in source.records():
        counts[f"{entry.split} {reason(entry)}"] += 1
        counts[f"{entry.split} rounds"] += entry.texts.num_rounds  # type: ignore[union-attr]
    assert counts == {"train live": 290, "train rounds": 2900, "val live": 49, "val rounds": 490}


def test_the_last_round_of_a_test_dialog_has_no_answer(tmp_path: Path) -> None:
    settings = write(tmp_path, turn(), {"question": 1, "answer_options": [0, 2]})
    (dialog,) = record(build("visdial", **settings), "000000000009").texts.decode().dialogs
    assert dialog.caption == "a ball"
    assert (dialog.rounds[0].answer, dialog.rounds[0].options) == ("yes", ("maybe", "yes", "no"))
    last = dialog.rounds[1]
    assert (last.question, last.answer, last.gt_index) == ("is it big", "", -1)
    assert last.options == ("no", "yes")


@pytest.mark.parametrize("name", ["gt_relevance", "relevance"])
def test_rounds_are_counted_from_one_in_dense_annotations(tmp_path: Path, name: str) -> None:
    settings = write(tmp_path, turn(), turn(question=1))
    dense = write_dense(tmp_path, {"image_id": 9, "round_id": 2, name: [0.0, 1.0, 0.5]})
    (dialog,) = record(build("visdial", **settings, **dense), "000000000009").texts.decode().dialogs
    assert [found.relevance for found in dialog.rounds] == [(), (0.0, 1.0, 0.5)]


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"round_id": 0, "gt_relevance": [0, 0, 0]}, "count from 1"),
        ({"round_id": 2, "gt_relevance": [0, 0, 0]}, "'round_id': expected a whole number"),
        ({"round_id": 1, "gt_relevance": [0, 0]}, "expected 3 numbers.*round 1, found 2"),
        ({"round_id": 1, "gt_relevance": [0, 0, 2]}, "from 0 to 1"),
        ({"round_id": 1}, "expected a field 'gt_relevance'"),
    ],
)
def test_dense_annotations_that_do_not_fit_are_named(
    tmp_path: Path, entry: dict[str, Any], match: str
) -> None:
    settings = write(tmp_path, turn()) | write_dense(tmp_path, {"image_id": 9, **entry})
    with pytest.raises(SourceError, match=rf"dense\.json\[0\]: .*{match}"):
        listed(build("visdial", **settings))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"question": 2}, "'question': expected a whole number from 0 to 1, found 2"),
        ({"answer": 7}, "'answer': expected a whole number from 0 to 2"),
        ({"answer_options": [1, 9]}, "'answer_options': expected numbers from 0 to 2, found 9"),
        ({"gt_index": 3}, "'gt_index': expected a whole number from 0 to 2"),
        ({"gt_index": 0}, "'gt_index': option 0 is answer 1, not 2"),
    ],
)
def test_numbers_beyond_the_lists_are_named(
    tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    settings = write(tmp_path, turn(**changes))
    with pytest.raises(SourceError, match=rf"data\.dialogs\[0\]\.dialog\[0\]: {match}"):
        listed(build("visdial", **settings))


def test_each_fault_has_its_reason(tmp_path: Path) -> None:
    settings = write(tmp_path)
    dense = write_dense(tmp_path, {"image_id": 4, "round_id": 1, "gt_relevance": []})
    assert reasons(build("visdial", **settings, **dense)) == {"no-rounds": 1, "unknown-image": 1}
    assert reasons(build("visdial", **write(tmp_path, turn(), image_id=8))) == {"missing-image": 1}


def test_settings_that_disagree_are_refused() -> None:
    with pytest.raises(ConfigError, match="dense has the splits"):
        build("visdial", images="i", dialogs="d", dense={"val": "x"})
    with pytest.raises(ConfigError, match="by split too"):
        build("visdial", images="i", dialogs={"val": "d"}, dense="x")
