import io
import json
import os
import socket
import subprocess
import zipfile
from pathlib import Path

import boto3
import pytest

from pipeline import storage
from pipeline.data.sample import safe_key
from pipeline.data.sources.base import Record, Reject
from pipeline.errors import SourceError, StorageError
from tests.data.sources.built import build, draw, ingested, listed, reason, reasons, record


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
    assert found.texts.decode().captions == ("A dog.", "A brown dog.")
    assert source.read(found) == (tmp_path / "dog.jpg").read_bytes()
    (key,) = (key for key in listed(source) if key.startswith("sub-cat-"))
    assert record(source, key).texts.decode().questions[0].answers == ("a cat",)
    assert record(source, key).suffix == "png"
    assert set(record(source, "both").texts.decode().captions) == {"one", "two"}


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
    before = record(source, "steps").image_fingerprint
    draw(tmp_path / "steps" / "3.png")
    assert record(source, "steps").image_fingerprint != before


def described(folder: Path, *names: str) -> None:
    """Writes an image with a text beside it for each name."""
    draw(*(folder / f"{name}.png" for name in names))
    for name in names:
        (folder / f"{name}.txt").write_text(f"picture {name}")


def test_what_is_no_file_costs_its_own_record_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    described(folder, "a", "dangling", "circle", "fifo", "socket", "text", "sub/b")
    for name in ("dangling", "circle", "fifo", "socket"):
        (folder / f"{name}.png").unlink()
    (folder / "dangling.png").symlink_to("../objects/MISSING")
    (folder / "circle.png").symlink_to("circle.png")
    os.mkfifo(folder / "fifo.png")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(folder)  # the name of a socket may be 107 bytes
        listening.bind("socket.png")
    (folder / "text.txt").unlink()
    (folder / "text.txt").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    (folder / "sub" / "loop").symlink_to("..")
    (folder / "sub" / "device").symlink_to("/dev/null")

    found = listed(build("folder", folder=str(folder)))

    live = {key for key, entry in found.items() if isinstance(entry, Record)}
    assert live == {"a", safe_key("sub/b")}
    rejects = {key: entry for key, entry in found.items() if isinstance(entry, Reject)}
    expected = {
        "dangling": ("missing-image", "a link to nothing"),
        "circle": ("missing-image", "a link in a circle"),
        "fifo": ("missing-image", "a FIFO"),
        "socket": ("missing-image", "a socket"),
        "text": ("malformed-texts", "a link to nothing"),
        "pipe": ("missing-image", "a FIFO"),
        safe_key("sub/loop"): ("link-loop", "a link to a folder that it lies in"),
        safe_key("sub/device"): ("missing-image", "a device"),
    }
    assert {key: reject.reason for key, reject in rejects.items()} == {
        key: reason for key, (reason, _) in expected.items()
    }
    for key, (_, words) in expected.items():
        assert words in rejects[key].detail
    assert ingested(build("folder", folder=str(folder)), tmp_path).num_live == 2


def test_a_name_that_is_not_utf8_costs_its_own_record_only(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    described(folder, "a")
    raw = os.fsencode(folder)
    os.link(folder / "a.png", raw + b"/caf\xe9.png")
    os.link(folder / "a.txt", raw + b"/caf\xe9.txt")
    Path(os.fsdecode(raw + b"/\xff")).mkdir()
    os.link(folder / "a.png", raw + b"/\xff/b.png")
    source = build("folder", folder=str(folder))
    report = ingested(source, tmp_path)
    assert (report.num_live, report.rejects) == (1, {"name-not-utf8": 2})
    details = "".join(entry.detail for entry in source.records() if isinstance(entry, Reject))
    assert "caf\\xe9.png" in details
    assert ingested(source, tmp_path).num_unchanged == 3


def test_suffixes_are_in_any_case(tmp_path: Path) -> None:
    for name, suffix in (("1", "TXT"), ("2", "Txt"), ("3", "JSON")):
        draw(tmp_path / f"IMG_{name}.PNG")
        text = '{"captions": ["words"]}' if suffix == "JSON" else "words"
        (tmp_path / f"IMG_{name}.{suffix}").write_text(text)
    assert reasons(build("folder", folder=str(tmp_path))) == {"live": 3}


def test_a_dataset_in_the_folder_is_no_part_of_it(tmp_path: Path) -> None:
    described(tmp_path, "a", "b")
    source = build("folder", folder=str(tmp_path))
    for _ in range(2):
        report = ingested(source, tmp_path)
        assert (report.num_live, report.num_rejects) == (2, 0)


def test_folders_in_a_video_are_listed_and_a_frame_that_is_no_file_rejects_it(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "photos"
    draw(*(folder / "dog" / f"{n}.png" for n in range(3)))
    described(folder / "dog", "more/cat")
    (folder / "dog.txt").write_text("a video")
    source = build("folder", folder=str(folder))
    assert reasons(source) == {"live": 2}
    (folder / "dog" / "3.png").symlink_to("nowhere")
    report = ingested(source, tmp_path)
    assert (report.num_live, report.rejects) == (1, {"unreadable-image": 1})


def test_a_field_given_twice_is_no_text(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "a.json").write_text('{"captions": "one", "captions": "two"}')
    (entry,) = build("folder", folder=str(tmp_path)).records()
    assert reason(entry) == "malformed-texts"
    assert "'captions' is given twice" in entry.detail


def test_what_windows_puts_beside_files_is_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    described(folder, "a")
    draw(*(folder / "clip" / f"{n}.png" for n in range(2)))
    (folder / "clip.txt").write_text("a video")
    for name in ("Thumbs.db", "desktop.ini", "clip/Thumbs.db"):
        (folder / name).write_bytes(b"of Windows")
    source = build("folder", folder=str(folder))
    assert reasons(source) == {"live": 2}
    assert ingested(source, tmp_path).num_live == 2


def test_a_folder_that_vanishes_while_it_is_listed_is_named(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    described(tmp_path, "a")
    entries = build("folder", folder=str(tmp_path)).records()
    next(entries)
    (tmp_path / "sub").rmdir()
    with pytest.raises(StorageError, match="sub: cannot be looked up"):
        list(entries)


def test_a_text_among_frames_makes_no_folder_beside_it_a_video(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    draw(folder / "dog" / "1.png", folder / "dog" / "more" / "1.png")
    (folder / "dog.txt").write_text("a video")
    (folder / "dog" / "more.txt").write_text("a note")
    assert reasons(build("folder", folder=str(folder))) == {"live": 1, "no-texts": 1}


def test_a_link_up_is_no_video_whatever_describes_it(tmp_path: Path) -> None:
    described(tmp_path, "a")
    (tmp_path / "up").symlink_to(".")
    (tmp_path / "up.txt").write_text("a text")
    source = build("folder", folder=str(tmp_path))
    assert reasons(source) == {"live": 1, "missing-image": 1, "link-loop": 1}


def test_folders_may_lie_deep_in_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depth = 1200  # more than Python's limit of calls in one another
    described(tmp_path, "a")
    monkeypatch.chdir(tmp_path)
    for _ in range(depth):
        Path("d").mkdir()
        monkeypatch.chdir("d")
    os.link(tmp_path / "a.png", "b.png")
    source = build("folder", folder=str(tmp_path))
    assert reasons(source) == {"live": 1, "no-texts": 1}
    subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)  # pytest's own is recursive


def test_keys_that_only_an_object_store_has(object_store: str, tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    image = (tmp_path / "a.png").read_bytes()
    bucket = object_store.removeprefix("s3://").partition("/")[0]
    store = boto3.client("s3")
    for key in ("a", "sub/a", "/x", "file", "file.png/inside"):
        store.put_object(Bucket=bucket, Key=f"photos/{key}.png", Body=image)
        store.put_object(Bucket=bucket, Key=f"photos/{key}.txt", Body=b"words")
    for key in ("", "sub/"):
        store.put_object(Bucket=bucket, Key=f"photos/{key}", Body=b"")
    source = build("folder", folder=f"s3://{bucket}/photos")
    assert reasons(source) == {"live": 4, "unnamed-folder": 1}
    assert ingested(source, tmp_path / "out").num_live == 4
