import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.manifest.manifest import Manifest
from pipeline.errors import ConfigError, SourceError
from tests.data.sources.built import build, draw, ingested, listed, reason, reasons, record


def entry(name: str, split: str, *captions: str, **more: Any) -> dict[str, Any]:
    sentences = [{"raw": caption, "tokens": caption.split()} for caption in captions]
    return {"filename": name, "split": split, "imgid": 0, "sentences": sentences, **more}


def write(path: Path, *images: dict[str, Any]) -> str:
    path.write_text(json.dumps({"images": images, "dataset": "test"}))
    return str(path)


def test_flickr8k_has_813_samples_and_4065_captions(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "flickr8k"
    source = build(
        "karpathy",
        images=str(folder / "Flicker8k_Dataset"),
        annotations=str(folder / "dataset_flickr8k.json"),
    )
    report = ingested(source, tmp_path)
    assert (report.num_live, report.rejects) == (813, {})
    samples = Manifest.open(str(tmp_path / "dataset")).samples()
    assert Counter(samples["split"].to_pylist()) == {"train": 753, "validation": 60}
    assert sum(samples["num_captions"].to_pylist()) == 4065


def test_flickr30k_has_7_samples_and_1194_missing_images(shared_data: Path) -> None:
    folder = shared_data / "flickr30k"
    source = build(
        "karpathy",
        images=str(folder / "flickr30k-images"),
        annotations=str(folder / "dataset_flickr30k.json"),
        splits={},
    )
    entries = listed(source)
    assert Counter(map(reason, entries.values())) == {"live": 7, "missing-image": 1194}
    splits = Counter(entry.split for entry in entries.values())
    assert splits == {"train": 904, "val": 150, "test": 147}
    found = record(source, "6338542128")
    assert found.texts.decode().image_id == "6338542128"
    assert len(found.texts.decode().captions) == 5


def test_coco_images_are_found_in_their_subfolder_beside_it_or_by_number(tmp_path: Path) -> None:
    names = [f"COCO_val2014_{number:012d}.jpg" for number in (1, 2, 3, 4)]
    draw(
        tmp_path / "val2014" / names[0],
        tmp_path / names[1],
        tmp_path / "000000000003.jpg",  # as COCO 2017 calls it
    )
    annotations = write(
        tmp_path / "dataset_coco.json",
        entry(names[0], "test", "one ", filepath="val2014", cocoid=1),
        entry(names[1], "restval", "two", "", filepath="val2014", cocoid=2),
        entry(names[2], "val", "three", filepath="val2014", cocoid=3),
        entry(names[3], "train", "four", filepath="val2014", cocoid=4),
    )
    source = build("karpathy", images=str(tmp_path), annotations=annotations)
    entries = listed(source)
    assert {key: (reason(found), found.split) for key, found in entries.items()} == {
        "000000000001": ("live", "test"),
        "000000000002": ("live", "train"),
        "000000000003": ("live", "validation"),
        "000000000004": ("missing-image", "train"),
    }
    assert "val2014/" in entries["000000000004"].detail or names[3] in (
        entries["000000000004"].detail
    )
    found = record(source, "000000000002")
    assert (found.texts.decode().image_id, found.texts.decode().captions) == (2, ("two",))
    assert found.detail == "1 empty captions dropped"
    assert source.read(found) == (tmp_path / names[1]).read_bytes()


def test_an_image_without_words_is_a_reject(tmp_path: Path) -> None:
    draw(tmp_path / "a.jpg")
    annotations = write(tmp_path / "k.json", entry("a.jpg", "train", " "))
    source = build("karpathy", images=str(tmp_path), annotations=annotations)
    assert reasons(source) == {"no-captions": 1}


@pytest.mark.parametrize(
    ("image", "match"),
    [
        ({"filename": "a.jpg", "split": "train"}, r"images\[0\]: expected a field 'sentences'"),
        (entry("a.jpg", "a b"), r"images\[0\]: 'split': .*only ASCII"),
        (entry("a.jpg", "train") | {"sentences": [{"tokens": []}]}, r"sentences\[0\].*'raw'"),
        (entry("a.jpg", "train", cocoid=1.5), "'cocoid': expected a number or a string"),
    ],
)
def test_entries_of_another_shape_are_named(
    tmp_path: Path, image: dict[str, Any], match: str
) -> None:
    annotations = write(tmp_path / "k.json", image)
    with pytest.raises(SourceError, match=match):
        listed(build("karpathy", images=str(tmp_path), annotations=annotations))


def test_a_split_cannot_be_renamed_to_what_no_folder_is_called(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only ASCII"):
        build("karpathy", images=str(tmp_path), annotations="a", splits={"val": "a/b"})
