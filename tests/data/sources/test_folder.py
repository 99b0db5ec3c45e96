import io
import json
import zipfile
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import SourceError, StorageError
from tests.data.sources.built import build, draw, ingested, listed, reason, record


def test_images_have_the_texts_beside_them(tmp_path: Path) -> None:
    draw(tmp_path / "dog.jpg", tmp_path / "sub" / "cat.PNG", tmp_path / "both.jpeg")
    (tmp_path / "dog.txt").write_text("A dog.\n\n A brown dog. \n")
    (tmp_path / "sub" / "cat.json").write_text(
        json.dumps({"questions": [{"question": "what?", "answer": "a cat"}]})
    )
    (tmp_path / "both.txt").write_text("one\n")
    (tmp_path / "both.json").write_text(json.dumps({"captions": ["two"]}))
    source = build("folder", folder=str(tmp_path), validation_fraction=0.0)
    found = record(source, "dog")
    assert found.texts.captions == ("A dog.", "A brown dog.")
    assert source.read(found) == (tmp_path / "dog.jpg").read_bytes()
    (key,) = (key for key in listed(source) if key.startswith("sub-cat-"))
    assert record(source, key).texts.questions[0].answers == ("a cat",)
    assert record(source, key).suffix == "png"
    assert set(record(source, "both").texts.captions) == {"one", "two"}


def test_each_fault_has_its_reason(tmp_path: Path) -> None:
    draw(*(tmp_path / name for name in ("a.jpg", "b.jpg", "c.jpg", "same.jpg", "same.png")))
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.json").write_text("[1]")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "same.txt").write_text("x")
    (tmp_path / "lost.txt").write_text("words")
    (tmp_path / "notes.md").write_text("words")
    (tmp_path / ".DS_Store").write_text("words")
    source = build("folder", folder=str(tmp_path))
    entries = list(source.records())
    found = {entry.key.partition("-")[0]: reason(entry) for entry in entries}
    assert found == {
        "a": "no-texts",
        "b": "malformed-texts",
        "c": "malformed-texts",
        "same": "live",
        "lost": "missing-image",
        "notes": "unknown-suffix",
    }
    details = {entry.key: entry.detail for entry in entries}
    assert "b.json: expected a JSON object" in details["b"]
    report = ingested(source, tmp_path.parent / f"{tmp_path.name}-out")
    assert report.rejects["duplicate-id"] == 1
    assert report.num_live == 1


def test_fields_of_json_are_mapped_and_splits_are_folders(tmp_path: Path) -> None:
    for split in ("train", "test"):
        draw(tmp_path / split / f"{split}.jpg")
        (tmp_path / split / f"{split}.json").write_text(json.dumps({"meta": {"alt": split}}))
    source = build(
        "folder",
        folder={split: str(tmp_path / split) for split in ("train", "test")},
        texts={"captions": "meta.alt"},
    )
    entries = [(entry.key, entry.split, reason(entry)) for entry in source.records()]
    assert entries == [("train", "train", "live"), ("test", "test", "live")]


def test_an_absent_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises((SourceError, StorageError), match="nowhere: no such folder"):
        listed(build("folder", folder=str(tmp_path / "nowhere")))


def test_a_folder_may_be_on_an_object_store(tmp_path: Path, object_store: str) -> None:
    draw(tmp_path / "a.jpg")
    for name in ("a.jpg", "sub/b.jpg"):
        storage.write_bytes(f"{object_store}/{name}", (tmp_path / "a.jpg").read_bytes())
    for name in ("a.txt", "sub/b.txt"):
        storage.write_bytes(f"{object_store}/{name}", b"words")
    source = build("folder", folder=object_store)
    assert [reason(entry) for entry in source.records()] == ["live", "live"]
    assert source.read(record(source, "a")) == (tmp_path / "a.jpg").read_bytes()


def test_videos_dicom_and_folders_of_frames_are_samples_too(tmp_path: Path) -> None:
    draw(tmp_path / "steps" / "2.png", tmp_path / "steps" / "10.png", tmp_path / "sub" / "cat.jpg")
    for name, payload in {"clip.MP4": b"a", "scan.dcm": b"b", "packed.zip": b"c"}.items():
        (tmp_path / name).write_bytes(payload)
    for name in ("clip", "scan", "packed", "steps", "sub/cat"):
        (tmp_path / f"{name}.txt").write_text("words")
    source = build("folder", folder=str(tmp_path))
    suffixes = {key.partition("-")[0]: record(source, key).suffix for key in listed(source)}
    expected = {"clip": "mp4", "scan": "dcm", "packed": "zip", "steps": "zip", "sub": "jpg"}
    assert suffixes == expected
    payload = source.read(record(source, "steps"))
    assert payload == source.read(record(source, "steps"))
    with zipfile.ZipFile(io.BytesIO(payload)) as frames:
        assert frames.namelist() == ["10.png", "2.png"]
        assert frames.read("2.png") == (tmp_path / "steps" / "2.png").read_bytes()
    before = record(source, "steps").fingerprint
    draw(tmp_path / "steps" / "3.png")
    assert record(source, "steps").fingerprint != before
