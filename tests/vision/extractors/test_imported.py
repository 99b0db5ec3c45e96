import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.read.dataset import Dataset
from pipeline.errors import ConfigError, FeatureError, RejectError
from pipeline.vision.extract import ExtractConfig, extract
from pipeline.vision.extractors.imported import ImportedConfig, import_features, match
from pipeline.vision.extractors.registry import from_card
from tests.vision import published_files as files
from tests.vision.photo_dataset import make_dataset, picture


def dataset(folder: Path, count: int) -> str:
    url = str(folder / "dataset")
    images = {f"{number:012d}": picture(number) for number in range(count)}
    make_dataset(url, images, samples_per_shard=3)
    return url


def published(folder: Path, count: int) -> str:
    images = {f"COCO_train2014_{n:012d}": files.make(n) for n in reversed(range(count))}
    return files.write_table(folder / "features.tsv", images, "LXMERT")


@pytest.mark.parametrize("stored", ["float32", "float16", "int8"])
def test_a_dataset_reads_the_published_features_of_its_samples(tmp_path: Path, stored: Any) -> None:
    url = dataset(tmp_path, 7)
    report = import_features(url, published(tmp_path, 9), stored)
    assert (report.num_images, report.num_missing, report.num_unused) == (7, 0, 2)
    split = Dataset.open(url).split("train", report.extractor)
    batch = split.features(range(7))
    for i, key in enumerate(split.each_key()):
        made = files.make(int(key))
        count = len(made.values)
        assert batch.num_regions[i] == count
        if stored == "float32":
            np.testing.assert_array_equal(batch.values[i, :count], made.values)
        tolerance = {"float32": 0.0, "float16": 1e-3, "int8": 0.02}[stored]
        np.testing.assert_allclose(batch.values[i, :count], made.values, atol=tolerance)
        np.testing.assert_allclose(batch.boxes[i, :count], made.fractions(), atol=1e-7)
        assert batch.labels is not None
        np.testing.assert_array_equal(batch.labels[i, :count], made.objects)
    loss = report.card.environments[0].storage_error
    assert loss is not None
    assert (loss.relative_rms == 0) == (stored == "float32")


def test_a_second_import_does_what_is_left(tmp_path: Path) -> None:
    url = dataset(tmp_path, 4)
    path = published(tmp_path, 9)
    first = import_features(url, path)
    again = import_features(url, path)
    assert (again.num_images, again.num_unchanged, again.size_bytes) == (0, 4, 0)
    dataset(tmp_path, 8)
    more = import_features(url, path)
    assert more.extractor == first.extractor
    assert more.num_images >= 4
    assert Dataset.open(url).split("train", first.extractor).num_samples == 8


def test_samples_without_published_features_are_counted_and_not_hidden(tmp_path: Path) -> None:
    url = dataset(tmp_path, 6)
    report = import_features(url, published(tmp_path, 4))
    assert report.num_missing == 2
    with pytest.raises(FeatureError, match="2 of the 6 live samples"):
        Dataset.open(url).split("train", report.extractor)
    here = ExtractConfig(actors=0)
    with pytest.raises(ConfigError, match="imported, and cannot be computed for a picture"):
        extract(url, ImportedConfig.model_validate(report.card.config), here)


def test_an_image_whose_features_cannot_be_used_costs_its_sample(tmp_path: Path) -> None:
    url = dataset(tmp_path, 6)
    path = Path(published(tmp_path, 6))
    lines = path.read_text().splitlines(keepends=True)
    key = lines[2].split("\t")[0]
    lines[2] = lines[2][:-30] + "\n"
    path.write_text("".join([*lines, lines[4]]))
    report = import_features(url, str(path))
    assert (report.num_images, report.num_repeated) == (5, 1)
    assert report.rejects == {"cut-short": 1}
    split = Dataset.open(url).split("train", report.extractor)
    assert (split.num_samples, split.num_rejects) == (5, 1)
    assert key not in [f"{int(each)}" for each in split.each_key()]
    again = import_features(url, str(path))
    assert (again.num_images, again.rejects) == (0, {"cut-short": 1})
    config = ImportedConfig.model_validate(report.card.config)
    with pytest.raises(RejectError, match="nothing of 1 of 6 samples"):
        extract(url, config, ExtractConfig(actors=0))
    allowed = extract(url, config, ExtractConfig(actors=0, max_reject_fraction=0.2))
    assert allowed.rejects == {"cut-short": 1}


def test_a_file_without_a_usable_image_is_refused(tmp_path: Path) -> None:
    url = dataset(tmp_path, 2)
    path = Path(published(tmp_path, 2))
    path.write_text("".join(line[:-30] + "\n" for line in path.read_text().splitlines()))
    with pytest.raises(FeatureError, match=r"none of 2 images has features.*cut-short"):
        import_features(url, str(path))


def test_boxes_that_make_sense_as_widths_alone_are_refused_with_the_option(tmp_path: Path) -> None:
    url = dataset(tmp_path, 3)
    images = {}
    for number in range(3):
        made = files.make(number)
        sizes = made.boxes[:, 2:] - made.boxes[:, :2]
        boxes = np.concatenate([made.boxes[:, :2] + [90, 45], sizes / 10], axis=1)
        images[f"{number}"] = replace(made, boxes=boxes.astype(np.float32))
    path = files.write_table(tmp_path / "xywh.tsv", images, "bottom-up attention")
    with pytest.raises(FeatureError, match="--boxes xywh, or --boxes corners"):
        import_features(url, path)
    report = import_features(url, path, boxes="xywh")
    assert report.rejects == {}
    split = Dataset.open(url).split("train", report.extractor)
    boxes = split.features(range(3)).boxes
    assert (boxes[..., 2:] >= boxes[..., :2]).all()
    with pytest.raises(FeatureError, match="none of 3 images has"):
        import_features(url, path, boxes="corners")


def test_a_recipe_takes_the_config_of_the_card(tmp_path: Path) -> None:
    url = dataset(tmp_path, 5)
    report = import_features(url, published(tmp_path, 5))
    config = ImportedConfig.model_validate(report.card.config)
    config.check()
    assert config.build().name == report.extractor
    unchanged = extract(url, config, ExtractConfig(actors=0))
    assert (unchanged.num_images, unchanged.num_unchanged) == (0, 5)
    assert unchanged.card == report.card
    assert from_card(report.card).name == report.extractor


def test_ids_are_matched_with_the_keys_they_would_have() -> None:
    keys = {"000000000042", "1000092795", "cat-1"}
    found = match(["COCO_val2014_000000000042", "1000092795", "cat-1.jpg", "dog"], keys, "here")
    assert found == {
        "000000000042": "COCO_val2014_000000000042",
        "1000092795": "1000092795",
        "cat-1": "cat-1.jpg",
    }
    assert match(["42"], keys, "here") == {"000000000042": "42"}
    with pytest.raises(FeatureError, match="both '42' and '000000000042' are sample"):
        match(["42", "000000000042"], keys, "here")
    with pytest.raises(FeatureError, match="first id is 'dog', a key is '000000000042'"):
        match(["dog"], keys, "here")


@pytest.mark.parametrize("layout", ["bottom-up attention", "LXMERT", "npz", "openvqa", "VOLTA"])
def test_every_published_layout_is_read_as_the_features_of_a_dataset(
    tmp_path: Path, layout: str
) -> None:
    url = dataset(tmp_path, 5)
    images = {f"{n:012d}": files.make(n) for n in range(5)}
    location = {
        "npz": lambda: files.write_uniter(tmp_path / "npz", images),
        "openvqa": lambda: files.write_openvqa(tmp_path / "openvqa", images),
        "VOLTA": lambda: files.write_volta(tmp_path / "f.h5", images),
    }.get(layout, lambda: files.write_table(tmp_path / "f.tsv", images, layout))()
    names = ["cat", "dog", "bird"]
    report = import_features(url, location, "float32", names)
    card = json.loads((Path(url) / "features" / report.extractor / "card.json").read_text())
    assert card["class_names"] == names
    split = Dataset.open(url).split("train", report.extractor)
    batch = split.features(range(5))
    tolerance = 1e-2 if layout == "npz" else 1e-6  # published as float16
    for i, key in enumerate(split.each_key()):
        made = images[key]
        count = len(made.values)
        np.testing.assert_allclose(batch.values[i, :count], made.values, rtol=tolerance)
        np.testing.assert_allclose(batch.boxes[i, :count], made.fractions(), atol=1e-3)
