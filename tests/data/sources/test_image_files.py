from pathlib import Path

import pytest

from pipeline.data.sample import Texts
from pipeline.data.sources.base import Record, Reject
from pipeline.data.sources.image_files import (
    ImageFile,
    ImageFolders,
    image_key,
    image_name,
    listed,
    read_image,
)
from pipeline.errors import SourceError
from pipeline.reason import Reason
from tests.data.sources.built import draw


def test_a_number_finds_the_file_whose_name_ends_with_it(tmp_path: Path) -> None:
    names = ["COCO_train2014_000000000009.jpg", "image25.png", "000000000003.jpg", "12.txt"]
    for name in names:
        (tmp_path / name).touch()
    folders = ImageFolders(str(tmp_path))
    assert folders.numbered(9).location.endswith(names[0])
    assert folders.numbered("25").location.endswith(names[1])
    assert folders.numbered(3).location.endswith(names[2])
    assert folders.numbered(12).stamp is None
    assert folders.numbered(5).location == f"{tmp_path}/*000000000005.jpg"
    assert folders.numbered("image25").location.endswith("image25.png")


def test_the_first_folder_that_has_a_file_is_taken(tmp_path: Path) -> None:
    draw(tmp_path / "a" / "1.jpg", tmp_path / "b" / "1.jpg", tmp_path / "b" / "2.jpg")
    folders = ImageFolders(str(tmp_path / "a"), str(tmp_path / "b"))
    assert folders.numbered(1).location == str(tmp_path / "a" / "1.jpg")
    assert folders.named("2.jpg").location == str(tmp_path / "b" / "2.jpg")
    assert folders.named("3.jpg") == ImageFile(str(tmp_path / "a" / "3.jpg"), None, "jpg")
    assert folders.called("2").location == str(tmp_path / "b" / "2.jpg")


def test_names_may_begin_with_subfolders_that_may_be_absent(tmp_path: Path) -> None:
    draw(tmp_path / "val2014" / "x.JPEG")
    folders = ImageFolders(str(tmp_path))
    assert folders.named("val2014/x.JPEG").suffix == "jpg"
    assert folders.named("val2014/x.JPEG").stamp
    assert folders.named("train2014/x.jpg").stamp is None
    assert folders.named(str(tmp_path / "val2014" / "x.JPEG")).stamp


@pytest.mark.parametrize(
    "name",
    [
        "../secret.jpg",
        "sub/../../secret.jpg",
        "{folder}/secret.jpg",
        "file://{folder}/secret.jpg",
        "s3://bucket/secret.jpg",
        "simplecache::http://127.0.0.1:9/secret.jpg",
        "zip://secret.jpg::{folder}/secret.zip",
        "a\0b.jpg",
        "",
        ".",
    ],
)
def test_a_name_that_leads_out_of_the_folders_is_not_looked_up(tmp_path: Path, name: str) -> None:
    draw(tmp_path / "secret.jpg", tmp_path / "images" / "sub" / "a.jpg")
    folders = ImageFolders(str(tmp_path / "images"))
    image = folders.named(name.format(folder=tmp_path))
    assert image.forbidden
    assert image.stamp is None
    entry = listed("k", "train", image, Texts(1, ("words",)))
    assert isinstance(entry, Reject)
    assert (entry.reason, entry.remains.image) == ("forbidden-location", "")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "name", ["./sub//a.jpg", "sub/../sub/a.jpg", "{folder}/images/sub/a.jpg", "../other/b.jpg"]
)
def test_a_name_may_lead_to_a_file_below_any_of_the_folders(tmp_path: Path, name: str) -> None:
    draw(tmp_path / "images" / "sub" / "a.jpg", tmp_path / "other" / "b.jpg")
    folders = ImageFolders(str(tmp_path / "images"), str(tmp_path / "other"))
    image = folders.named(name.format(folder=tmp_path))
    assert (image.forbidden, image.suffix) == ("", "jpg")
    assert image.stamp
    assert ".." not in image.location


def test_files_of_a_scheme_may_be_named_wherever_they_are(tmp_path: Path) -> None:
    draw(tmp_path / "else" / "b.jpg", tmp_path / "images" / "a.jpg")
    folders = ImageFolders(str(tmp_path / "images"), schemes=("file",))
    assert folders.named("../else/b.jpg") == folders.named(str(tmp_path / "else" / "b.jpg"))
    assert folders.named("../else/b.jpg").stamp
    assert folders.named("s3://bucket/b.jpg").forbidden
    assert folders.named("~/b.jpg").location == f"{tmp_path}/images/~/b.jpg"


def test_names_of_any_length_are_absent_and_numbers_too(tmp_path: Path) -> None:
    folders = ImageFolders(str(tmp_path))
    assert folders.named(f"{'x' * 300}/{'y' * 5000}.jpg").stamp is None
    assert folders.numbered("9" * 5000).stamp is None
    assert len(image_key(10**200)) <= 80


def test_an_absent_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"images: .*nowhere: no such folder"):
        ImageFolders(str(tmp_path / "nowhere"))


def test_the_image_is_at_fault_before_the_texts() -> None:
    texts = Texts(1, ("words",))
    fault = (Reason.NO_CAPTIONS, "nothing describes it")
    missing = listed("k", "train", ImageFile.at("/a/x.jpg", None), texts, fault=fault)
    unknown = listed("k", "train", ImageFile.at("/a/x.jpg.1", "7"), texts, fault=fault)
    silent = listed("k", "train", ImageFile.at("/a/x.jpg", "7"), Texts(1), fault=fault)
    assert isinstance(missing, Reject)
    assert isinstance(unknown, Reject)
    assert isinstance(silent, Reject)
    assert (missing.reason, unknown.reason) == ("missing-image", "unknown-suffix")
    assert (silent.reason, silent.detail) == fault
    assert missing.remains is not None
    assert (missing.remains.image, missing.remains.texts) == ("", texts.encoded())
    assert silent.remains is not None
    assert silent.remains.image == "/a/x.jpg"
    live = listed("k", "train", ImageFile.at("/a/x.jpg", "7"), texts, detail="less")
    assert isinstance(live, Record)
    assert (live.suffix, live.detail) == ("jpg", "less")


def test_a_vanished_image_is_told_from_an_unreadable_one(tmp_path: Path) -> None:
    draw(tmp_path / "a.jpg")
    record = listed("a", "train", ImageFolders(str(tmp_path)).named("a.jpg"), Texts("a", ("x",)))
    assert isinstance(record, Record)
    assert read_image(record) == (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(SourceError, match="vanished"):
        read_image(record)


def test_keys_are_cocos_for_numbers_and_names_for_the_rest() -> None:
    assert image_key(9) == "000000000009"
    assert image_key("100652400") == "100652400"
    assert image_key(-1) != image_key(1)
    assert image_name("a.b.JPG") == "a.b"
    assert image_name("2258277193_586949ec62.jpg.1") == "2258277193_586949ec62.jpg.1"


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("a.JFIF", "jpg"), ("a.jpe", "jpg"), ("a.avif", "avif"), ("a.tiff", "tif"), ("a.svg", None)],
)
def test_the_name_of_an_image_says_the_suffix_of_its_part(name: str, suffix: str | None) -> None:
    assert ImageFile.at(f"/photographs/{name}", "1").suffix == suffix
    assert image_name(name) == ("a" if suffix else name)


def test_a_file_at_the_root_is_not_looked_for_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "a-name-of-no-other.jpg")
    monkeypatch.chdir(tmp_path)
    folders = ImageFolders(str(tmp_path), schemes=("file",))
    assert folders.named("/a-name-of-no-other.jpg").stamp is None
