import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.dataset import Dataset
from pipeline.errors import ConfigError, FeatureError
from pipeline.vision.extract import ExtractConfig, extract
from pipeline.vision.extractor import from_card
from pipeline.vision.imported import ImportedConfig, import_features, match
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
    for i, key in enumerate(split.keys):
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
    error = report.card["environments"][0]["storage_error"]["relative_rms"]
    assert (error == 0) == (stored == "float32")


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
        extract(url, ImportedConfig.model_validate(report.card["config"]), here)


def test_a_recipe_takes_the_config_of_the_card(tmp_path: Path) -> None:
    url = dataset(tmp_path, 5)
    report = import_features(url, published(tmp_path, 5))
    config = ImportedConfig.model_validate(report.card["config"])
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
    for i, key in enumerate(split.keys):
        made = images[key]
        count = len(made.values)
        np.testing.assert_allclose(batch.values[i, :count], made.values, rtol=tolerance)
        np.testing.assert_allclose(batch.boxes[i, :count], made.fractions(), atol=1e-3)
