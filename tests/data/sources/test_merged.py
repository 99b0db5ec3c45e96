import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import check, to_yaml
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.read.dataset import Dataset
from pipeline.errors import ConfigError
from tests.data.sources.built import (
    DatasetPart,
    build,
    draw,
    fingerprints,
    ingested,
    listed,
    reason,
    reasons,
    record,
)


def table(folder: Path, name: str, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"table": str(folder / f"{name}.jsonl"), "image": "file", "key": "id"}
    texts = {"captions": "text", "question": "q", "answers": "a"}
    return {"type": "table", "texts": texts, **settings, **more}


def row(identity: int, file: str, text: str | None, q: str | None = None) -> dict[str, Any]:
    return {"id": identity, "file": file, "text": text, "q": q, "a": "yes"}


def coco_with_vqa_and_dialogs(shared_data: Path, folder: Path) -> list[dict[str, Any]]:
    """COCO's captions, real VQA questions and dialogs written for some of the same images."""
    coco, vqa = shared_data / "coco", shared_data / "vqa_v2" / "with_images"
    official = json.loads((coco / "annotations" / "captions_train2017.json").read_text())
    dialogs = [
        {
            "image_id": image["id"],
            "caption": "a photograph",
            "dialog": [
                {"question": 0, "answer": 1, "answer_options": [0, 1], "gt_index": 1}
            ] * 3,
        }
        for image in official["images"][:20]
    ]  # fmt: skip
    data = {"questions": ["is it day"], "answers": ["no", "yes"], "dialogs": dialogs}
    (folder / "visdial.json").write_text(json.dumps({"data": data}))
    return [
        {
            "type": "coco-captions",
            "images": {"train": str(coco / "train2017")},
            "annotations": {"train": str(coco / "annotations" / "captions_train2017.json")},
        },
        {
            "type": "vqa",
            "images": {"train": str(vqa / "train2014")},
            "questions": {
                "train": str(vqa / "v2_OpenEnded_mscoco_train2014_questions.json")
            },
            "annotations": {"train": str(vqa / "v2_mscoco_train2014_annotations.json")},
        },
        {
            "type": "visdial",
            "images": {"train": [str(vqa / "train2014"), str(coco / "val2017")]},
            "dialogs": {"train": str(folder / "visdial.json")},
        },
    ]  # fmt: skip


def test_coco_vqa_and_dialogs_are_one_sample_for_each_photograph(
    shared_data: Path, tmp_path: Path
) -> None:
    settings = coco_with_vqa_and_dialogs(shared_data, tmp_path)
    apart = [listed(build(one["type"], **{k: v for k, v in one.items() if k != "type"}))
             for one in settings]  # fmt: skip
    shared = apart[0].keys() & apart[1].keys()
    assert len(shared) == 15
    source = build("merged", sources=settings)
    report = ingested(source, tmp_path)
    assert (report.num_live, report.rejects) == (50 + 48 - 15, {})
    samples = Manifest.open(str(tmp_path / "dataset")).samples()
    totals = {name: sum(samples[name].to_pylist()) for name in
              ("num_captions", "num_questions", "num_rounds")}  # fmt: skip
    official = shared_data / "coco" / "annotations" / "captions_train2017.json"
    num_captions = len(json.loads(official.read_text())["annotations"])
    assert totals == {"num_captions": num_captions, "num_questions": 76, "num_rounds": 60}
    assert len(set(samples["digest"].to_pylist())) == samples.num_rows
    split = Dataset.open(str(tmp_path / "dataset")).split("train")
    folder = shared_data / "coco" / "train2017"
    for number, key in enumerate(split.each_key()):
        if key in apart[0]:  # the first source's own file, though VQA's folder has one too
            assert split.image(number) == (folder / f"{key}.jpg").read_bytes()
    assert ingested(source, tmp_path).num_unchanged == 83


def test_an_image_of_one_source_serves_the_texts_of_another(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    source = build(
        "merged",
        sources=[
            table(tmp_path, "texts", [row(1, "nowhere.png", "words"), row(2, "lost.png", "x")]),
            table(tmp_path, "images", [row(1, "a.png", None), row(3, "a.png", "")]),
        ],
    )
    entries = listed(source)
    assert {key: reason(entry) for key, entry in entries.items()} == {
        "000000000001": "live",
        "000000000002": "missing-image",
        "000000000003": "no-texts",
    }
    found = record(source, "000000000001")
    assert found.texts.decode().captions == ("words",)
    assert source.read(found) == (tmp_path / "a.png").read_bytes()
    assert pickle.loads(pickle.dumps(source)).read(found) == source.read(found)


def test_a_later_source_adds_only_what_is_new(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    one = [row(1, "a.png", "same"), row(1, "a.png", "same"), row(1, "a.png", "one", "what?")]
    two = [row(1, "a.png", "same", "what?"), row(1, "a.png", "two", "why?")]
    sources = [table(tmp_path, "one", one), table(tmp_path, "two", two)]
    found = record(build("merged", sources=sources), "000000000001")
    assert found.texts.decode().captions == ("same", "same", "one", "two")
    assert [asked.question for asked in found.texts.decode().questions] == ["what?", "why?"]


def test_no_image_is_in_two_splits(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", tmp_path / "b.png")
    tables = {
        split: table(tmp_path, split, [row(1, "a.png", split), row(number, "b.png", split)])
        for number, split in enumerate(("test", "train"), 2)
    }
    sources = [{**made, "table": {split: made["table"]}} for split, made in tables.items()]
    entries = listed(build("merged", sources=sources))
    assert {key: entry.split for key, entry in entries.items()} == {
        "000000000001": "test",
        "000000000002": "test",
        "000000000003": "train",
    }
    assert entries["000000000001"].detail == "sources.1 lists it for train"


def test_what_one_source_bars_is_a_sample_only_where_another_lists_it(tmp_path: Path) -> None:
    draw(tmp_path / "a.jpg", tmp_path / "b.jpg")
    (tmp_path / "token").write_text("a.jpg#0\tone\nb.jpg#0\ttwo\n")
    (tmp_path / "list").write_text("\n")
    (tmp_path / "a.txt").write_text("three")
    flickr = {
        "type": "flickr",
        "images": str(tmp_path),
        "captions": str(tmp_path / "token"),
        "splits": {"train": str(tmp_path / "list")},
    }
    other = {"table": {"test": table(tmp_path, "t", [])["table"]}}
    rows = [{"file": "a.jpg", "text": "three"}]
    (tmp_path / "t.jsonl").write_text(json.dumps(rows[0]))
    second = {"type": "table", "image": "file", "texts": {"captions": "text"}, **other}
    entries = listed(build("merged", sources=[flickr, second]))
    assert {key: (reason(entry), entry.split) for key, entry in entries.items()} == {
        "a": ("live", "test"),
        "b": ("no-split", "unlisted"),
    }
    assert entries["a"].texts.decode().captions == ("one", "three")  # type: ignore[union-attr]


def test_a_key_that_one_source_lists_twice_is_a_sample_and_a_reject(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", tmp_path / "b.png")
    sources = [
        table(tmp_path, "one", [row(1, "a.png", "one"), row(1, "b.png", "another image")]),
        table(tmp_path, "two", [row(1, "a.png", "two")]),
    ]
    report = ingested(build("merged", sources=sources), tmp_path)
    assert (report.num_live, report.rejects) == (1, {"duplicate-id": 1})


def test_an_edit_in_one_source_keeps_the_image_half_of_the_fingerprint(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    first = table(tmp_path, "one", [row(1, "a.png", "one")])
    stamps = []
    for words in ("two", "two", "three"):
        second = table(tmp_path, "two", [row(1, "a.png", words)])
        source = build("merged", sources=[first, second])
        stamps.append(fingerprints(record(source, "000000000001")))
    assert stamps[0] == stamps[1] != stamps[2]
    assert stamps[0][0] == stamps[2][0]


def test_flickr_texts_join_by_the_name_of_the_image(shared_data: Path) -> None:
    folder = shared_data / "flickr30k"
    images = str(folder / "flickr30k-images")
    karpathy = {
        "type": "karpathy",
        "images": images,
        "annotations": str(folder / "dataset_flickr30k.json"),
    }
    own = {
        "type": "flickr",
        "images": images,
        "captions": str(folder / "results_20130124.token"),
    }
    source = build("merged", sources=[karpathy, own])
    entries = list(source.records())
    assert Counter(map(reason, entries)) == {"live": 7, "missing-image": 1194}
    assert reasons(source) == reasons(build("karpathy", images=images,
                                            annotations=karpathy["annotations"]))  # fmt: skip


def test_locations_and_faults_name_the_source(tmp_path: Path) -> None:
    settings = {"source": {"type": "merged", "sources": [table(tmp_path, "one", [])]}}
    source = check(DatasetPart, settings, "recipe").source
    assert source.locations() == {"sources.0.table": str(tmp_path / "one.jsonl")}
    with pytest.raises(ConfigError, match=r"source\.sources\.0\.table: missing"):
        build("merged", sources=[{"type": "table", "image": "file", "texts": {"captions": "t"}}])
    with pytest.raises(ConfigError, match=r"sources\.0\.image: unknown key; did you mean 'images'"):
        build("merged", sources=[{"type": "vqa", "images": "i", "questions": "q", "image": "x"}])
    with pytest.raises(ConfigError, match="sources"):
        build("merged", sources=[])


def test_every_type_survives_being_saved_with_its_defaults(tmp_path: Path) -> None:
    sources: list[dict[str, Any]] = [
        {"type": "shapes", "scenes": 2, "validation_scenes": 1},
        {"type": "coco-captions", "images": "i", "annotations": "a"},
        {"type": "karpathy", "images": ["i", "j"], "annotations": "a"},
        {"type": "flickr", "images": "i", "captions": "c", "splits": {"train": "l"}},
        {"type": "vqa", "images": {"train": ["i"]}, "questions": {"train": "q"}},
        {"type": "visdial", "images": "i", "dialogs": "d", "dense": "e"},
        {"type": "folder", "folder": "f"},
        {"type": "webdataset", "shards": {"train": ["s"]}},
        table(tmp_path, "t", []),
    ]
    part = check(DatasetPart, {"source": {"type": "merged", "sources": sources}}, "recipe")
    again = check(DatasetPart, yaml.safe_load(to_yaml(part)), "recipe")
    assert again == part
    assert [one.type for one in again.source.sources] == [one["type"] for one in sources]  # type: ignore[union-attr]
