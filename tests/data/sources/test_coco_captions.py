import json
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline import storage
from pipeline.config import Config, check
from pipeline.data.ingest.ingest import IngestConfig, ingest
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.sources import AnySource
from pipeline.data.sources.base import Record, Reject, Source
from pipeline.errors import ConfigError, SourceError, StorageError
from tests.data.sources.built import fingerprints
from tests.excerpts import EXCERPTS

OFFICIAL = EXCERPTS / "captions_train2017.json"


class Dataset(Config):
    source: AnySource


def build(folder: Path, **settings: Any) -> Source:
    document = {
        "source": {
            "type": "coco-captions",
            "images": str(folder / "images"),
            "annotations": str(folder / "captions.json"),
            **settings,
        }
    }
    return check(Dataset, document, "recipe").source.build()


def write_coco(
    folder: Path,
    names: dict[int | str, str],
    captions: list[tuple[int, int | str, str | None]],
    absent: tuple[str, ...] = (),
) -> None:
    (folder / "images").mkdir(exist_ok=True)
    for name in names.values():
        if name not in absent:
            (folder / "images" / name).parent.mkdir(exist_ok=True)
            Image.new("RGB", (7, 5)).save(folder / "images" / name, "JPEG")
    document = {
        "images": [{"id": image, "file_name": name} for image, name in names.items()],
        "annotations": [
            {"id": number, "image_id": image, "caption": caption}
            for number, image, caption in captions
        ],
    }
    (folder / "captions.json").write_text(json.dumps(document))


def listed(source: Source) -> dict[str, Record | Reject]:
    return {entry.key: entry for entry in source.records()}


def reason(entry: Record | Reject) -> str:
    return entry.reason if isinstance(entry, Reject) else "live"


def test_records_hold_every_caption_of_their_image(tmp_path: Path) -> None:
    write_coco(tmp_path, {7: "a.jpg", 8: "b.JPEG"}, [(1, 7, "one\n"), (2, 8, "x"), (3, 7, "two")])
    source = build(tmp_path)
    records = listed(source)
    record = records["000000000007"]
    assert isinstance(record, Record)
    assert record.texts.decode().image_id == 7
    assert record.texts.decode().captions == ("one", "two")
    assert record.suffix == "jpg"
    assert isinstance(records["000000000008"], Record)
    assert records["000000000008"].suffix == "jpg"
    assert source.read(record) == (tmp_path / "images" / "a.jpg").read_bytes()
    assert list(pickle.loads(pickle.dumps(source)).records()) == list(source.records())


def test_each_fault_has_its_reason(tmp_path: Path) -> None:
    names: dict[int | str, str] = {
        1: "good.jpg",
        2: "absent.jpg",
        3: "silent.jpg",
        4: "empty.jpg",
        5: "partly.jpg",
        6: "photo.jpg.1",
        7: "nowhere/a.jpg",
    }
    captions: list[tuple[int, int | str, str | None]] = [
        (1, 1, "good"),
        (2, 2, "absent"),
        (3, 4, " "),
        (4, 4, None),
        (5, 5, ""),
        (6, 5, "words"),
        (6, 5, "words"),
        (7, 6, "a number for a suffix"),
        (8, 7, "no image"),
        (9, 99, "nowhere"),
        (10, 99, "nowhere either"),
    ]
    write_coco(tmp_path, names, captions, absent=("absent.jpg", "nowhere/a.jpg"))
    found = listed(build(tmp_path))
    assert {key: reason(entry) for key, entry in found.items()} == {
        "000000000001": "live",
        "000000000002": "missing-image",
        "000000000003": "no-captions",
        "000000000004": "empty-captions",
        "000000000005": "live",
        "000000000006": "unknown-suffix",
        "000000000007": "missing-image",
        "000000000099": "unknown-image",
    }
    assert found["000000000005"].detail == "1 empty captions dropped, 1 repeated captions dropped"
    assert "absent.jpg" in found["000000000002"].detail
    assert "2 captions name image 99" in found["000000000099"].detail


def test_names_and_ids_beyond_ascii_become_samples(tmp_path: Path) -> None:
    write_coco(
        tmp_path,
        {"Größe": "größe.jpg", "猫": "猫 (1).jpg", "a.b": "sub/plain.jpg"},
        [(1, "Größe", "eins"), (2, "猫", "二"), (3, "a.b", "three")],
    )
    config = IngestConfig(shards_in_flight=0)
    report = ingest(build(tmp_path), str(tmp_path / "data"), config)
    assert (report.num_live, report.rejects) == (3, {})
    keys = Manifest.open(str(tmp_path / "data")).samples(["key"])["key"].to_pylist()
    assert all(key.isascii() for key in keys)


def test_an_id_listed_twice_is_one_sample_and_one_reject(tmp_path: Path) -> None:
    write_coco(tmp_path, {1: "a.jpg", 2: "b.jpg"}, [(1, 1, "one"), (2, 2, "two")])
    document = json.loads((tmp_path / "captions.json").read_text())
    document["images"].append({"id": 1, "file_name": "b.jpg"})
    (tmp_path / "captions.json").write_text(json.dumps(document))
    config = IngestConfig(shards_in_flight=0, max_reject_fraction=0.5)
    report = ingest(build(tmp_path), str(tmp_path / "data"), config)
    assert (report.num_live, report.rejects) == (2, {"duplicate-id": 1})


def test_fingerprints_follow_the_file_and_the_captions(tmp_path: Path) -> None:
    write_coco(tmp_path, {1: "a.jpg", 2: "b.jpg", 3: "c.jpg"}, [(n, n, "x") for n in (1, 2, 3)])
    source = build(tmp_path)
    before = listed(source)
    assert listed(source) == before
    os.utime(tmp_path / "images" / "a.jpg", ns=(1, 1))
    document = json.loads((tmp_path / "captions.json").read_text())
    document["annotations"][1]["caption"] = "y"
    (tmp_path / "captions.json").write_text(json.dumps(document))
    after = listed(source)
    changed = {key for key in before if fingerprints(before[key]) != fingerprints(after[key])}
    assert changed == {"000000000001", "000000000002"}


def test_a_single_file_is_split_by_the_hash_of_each_key(tmp_path: Path) -> None:
    write_coco(tmp_path, dict.fromkeys(range(200), "a.jpg"), [(n, n, "x") for n in range(200)])
    splits = {key: entry.split for key, entry in listed(build(tmp_path)).items()}
    assert 8 < Counter(splits.values())["validation"] < 40
    write_coco(
        tmp_path, dict.fromkeys(range(50, 99), "a.jpg"), [(n, n, "x") for n in range(50, 99)]
    )
    fewer = {key: entry.split for key, entry in listed(build(tmp_path)).items()}
    assert fewer.items() <= splits.items()
    none = listed(build(tmp_path, validation_fraction=0.0))
    assert {entry.split for entry in none.values()} == {"train"}


def test_a_file_and_a_folder_for_each_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        write_coco(tmp_path / split, {ord(split[-1]): "a.jpg"}, [(1, ord(split[-1]), split)])
    source = build(
        tmp_path,
        images={split: str(tmp_path / split / "images") for split in ("train", "test")},
        annotations={split: str(tmp_path / split / "captions.json") for split in ("train", "test")},
    )
    assert [(entry.split, reason(entry)) for entry in source.records()] == [
        ("train", "live"),
        ("test", "live"),
    ]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"images": [', "captions.json: not valid JSON: .*line 1"),
        ("[]", "found a list"),
        ('{"images": [], "info": 1}', "'annotations'; the file has the keys 'images', 'info'"),
        ('{"images": [], "annotations": {}}', "expected a list 'annotations'"),
        ('{"images": [3], "annotations": []}', r"images\[0\]: expected an object, found 3"),
        ('{"images": [{"id": 1}], "annotations": []}', r"images\[0\]: .*'file_name', found 'id'"),
        (
            '{"images": [], "annotations": [{"id": 1, "image_id": 2, "bbox": [1]}]}',
            r"annotations\[0\]: expected a field 'caption'.*COCO captions file",
        ),
        (
            '{"images": [], "annotations": [{"id": 1, "image_id": 2, "caption": 3}]}',
            "expected a string, found 3",
        ),
        (
            '{"images": [], "annotations": [{"id": 1, "image_id": 2.5, "caption": ""}]}',
            "expected a number or a string, found 2.5",
        ),
        (
            '{"images": [], "annotations": [{"id": 1, "image_id": 2, "caption": "\\ud800"}]}',
            "surrogate",
        ),
    ],
)
def test_files_of_another_shape_are_named(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "captions.json").write_text(text)
    with pytest.raises(SourceError, match=match):
        list(build(tmp_path).records())


def test_absent_files_and_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(StorageError, match=r"captions\.json: no such file"):
        list(build(tmp_path).records())
    write_coco(tmp_path, {1: "a.jpg"}, [(1, 1, "x")])
    with pytest.raises(SourceError, match=r"nowhere: no such folder"):
        list(build(tmp_path, images=str(tmp_path / "nowhere")).records())


def test_an_image_that_vanished_since_the_listing_is_a_reject(tmp_path: Path) -> None:
    write_coco(tmp_path, {1: "a.jpg"}, [(1, 1, "x")])
    source = build(tmp_path)
    (record,) = source.records()
    (tmp_path / "images" / "a.jpg").unlink()
    assert isinstance(record, Record)
    with pytest.raises(SourceError, match="vanished"):
        source.read(record)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"annotations": {"train": "a"}, "validation_fraction": 0.2}, "splits a single annotation"),
        ({"images": {"train": "a"}}, "annotations is one file"),
        ({"annotations": {"train": "a"}, "images": {"test": "a"}}, "must be the same"),
        ({"annotations": {"a/b": "a"}}, "only ASCII"),
        ({"annotations": {}}, "no file"),
        ({"validation_fraction": 1.5}, "validation_fraction"),
        ({"image": "a"}, "unknown key; did you mean 'images'"),
        ({"type": "coco"}, "coco-captions"),
    ],
)
def test_impossible_settings_are_refused(
    tmp_path: Path, settings: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        build(tmp_path, **settings)


def test_images_and_annotations_may_be_on_an_object_store(
    tmp_path: Path, object_store: str
) -> None:
    write_coco(tmp_path, {1: "a.jpg", 2: "b.jpg"}, [(1, 1, "one"), (2, 2, "two")], ("b.jpg",))
    for name in ("images/a.jpg", "captions.json"):
        storage.write_bytes(f"{object_store}/{name}", (tmp_path / name).read_bytes())
    source = build(
        tmp_path,
        images=f"{object_store}/images",
        annotations=f"{object_store}/captions.json",
    )
    found = listed(source)
    assert [reason(entry) for entry in found.values()] == ["live", "missing-image"]
    record = found["000000000001"]
    assert isinstance(record, Record)
    assert source.read(record) == (tmp_path / "images" / "a.jpg").read_bytes()


def test_the_official_excerpt_has_64_samples_and_1936_missing_images(
    shared_data: Path, tmp_path: Path
) -> None:
    coco = shared_data / "coco"
    source = build(
        tmp_path,
        images=str(coco / "val2017"),
        annotations=str(coco / "annotations" / "captions_val2017.json"),
    )
    config = IngestConfig(shards_in_flight=0, max_reject_fraction=1.0, samples_per_shard=30)
    report = ingest(source, str(tmp_path / "data"), config)
    assert (report.num_live, report.rejects) == (64, {"missing-image": 1936})
    samples = Manifest.open(str(tmp_path / "data")).samples()
    assert sum(samples["num_captions"].to_pylist()) == 320
    assert set(samples["split"].to_pylist()) == {"train", "validation"}


def test_an_excerpt_of_the_official_file_gives_every_caption(tmp_path: Path) -> None:
    official = json.loads(OFFICIAL.read_text())
    (tmp_path / "images").mkdir()
    for image in official["images"]:
        Image.new("RGB", (7, 5)).save(tmp_path / "images" / image["file_name"])
    captions: dict[str, list[str]] = {}
    for annotation in official["annotations"]:
        captions.setdefault(f"{annotation['image_id']:012d}", []).append(annotation["caption"])
    entries = listed(build(tmp_path, annotations=str(OFFICIAL)))
    assert entries.keys() == captions.keys()
    for key, entry in entries.items():
        assert isinstance(entry, Record)
        assert sorted(entry.texts.decode().captions) == sorted(
            text.strip() for text in captions[key]
        )


def test_a_captions_file_is_told_from_an_instances_file(shared_data: Path, tmp_path: Path) -> None:
    coco = shared_data / "coco"
    source = build(
        tmp_path,
        images=str(coco / "val2017"),
        annotations=str(coco / "annotations" / "instances_val2017.json"),
    )
    with pytest.raises(SourceError, match="Is it a COCO captions file"):
        list(source.records())
