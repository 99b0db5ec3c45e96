"""What extractors give against what a split reads back: every part, in every form of storage."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import FeatureRow, from_table, to_table
from pipeline.data.read.dataset import Dataset
from pipeline.errors import FeatureError
from pipeline.vision.extract import MEASURED_IMAGES, ExtractConfig, extract
from pipeline.vision.extractors.detection.regions import RegionsConfig
from pipeline.vision.extractors.detection.segments import SegmentsConfig
from pipeline.vision.extractors.grid import GridConfig
from pipeline.vision.extractors.registry import AnyExtractor
from tests.vision.photo_dataset import make_dataset, picture

HERE = ExtractConfig(actors=0, batch_size=2)
DETECTOR: dict[str, Any] = {
    "weights": "random",
    "num_classes": 5,
    "short_side": 32,
    "long_side": 64,
    "num_proposals": 12,
}
GRID = GridConfig(network="squeezenet1_0", node="features.2", weights="random", image_size=32)
REGIONS = RegionsConfig(
    network="fasterrcnn_mobilenet_v3_large_320_fpn", min_regions=2, max_regions=9, **DETECTOR
)
SEGMENTS = SegmentsConfig(
    network="maskrcnn_resnet50_fpn", min_regions=3, max_regions=3, mask_side=24, **DETECTOR
)


def images() -> dict[str, bytes]:
    return {f"photo-{n}": picture(n, 40 + 9 * n, 60 - 7 * n) for n in range(5)}


def extracted(url: Path, config: AnyExtractor) -> str:
    make_dataset(str(url), images(), samples_per_shard=3)
    return extract(str(url), config, HERE).extractor


def with_storage(config: AnyExtractor, storage: str) -> Any:
    return config.model_copy(update={"storage": storage})


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        with_storage(GRID, "float16"),
        with_storage(GRID, "int8"),
        with_storage(GRID, "int8-per-channel"),
        GRID.model_copy(update={"fit": "crop", "storage": "int8"}),
        with_storage(REGIONS, "float32"),
        with_storage(REGIONS.model_copy(update={"score_threshold": 0.217}), "int8"),
        with_storage(REGIONS, "int8-per-channel"),
        with_storage(SEGMENTS, "int8"),
    ],
    ids=lambda config: f"{config.type}-{config.storage}",
)
def test_a_split_reads_back_what_the_extractor_made(tmp_path: Path, config: Any) -> None:
    name = extracted(tmp_path, config)
    split = Dataset.open(str(tmp_path)).split("train", name)
    extractor = config.build()
    rows = [3, 0, 4, 1, 3]
    expected = [
        extractor.extract([extractor.prepare(images()[split.keys([row])[0]])])[0] for row in rows
    ]
    for _ in range(2):  # the second read finds used memory
        batch = split.features(rows)
        dtype = {"float16": np.float16}.get(config.storage, np.float32)
        assert batch.values.dtype == dtype
        for i, feature in enumerate(expected):
            count = len(feature.values)
            assert batch.num_regions[i] == count
            np.testing.assert_allclose(batch.values[i, :count], feature.values, atol=2e-5)
            assert not batch.values[i, count:].any()
            if feature.boxes is not None:
                np.testing.assert_array_equal(batch.boxes[i, :count], feature.boxes)
            for part in ("labels", "scores", "classes"):
                found = getattr(batch, part)
                if part not in feature.parts:
                    assert found is None
                    continue
                assert found.dtype == feature.parts[part].dtype
                np.testing.assert_array_equal(found[i, :count], feature.parts[part])
                assert not found[i, count:].any()
        del batch
    for row, feature in zip(rows, expected, strict=True):
        masks = split.masks(row)
        if feature.masks is None:
            assert masks is None
        else:
            assert masks is not None
            assert [mask["counts"] for mask in masks] == [mask.counts for mask in feature.masks]


def test_the_card_carries_invariance_error_and_size(tmp_path: Path) -> None:
    name = extracted(tmp_path, with_storage(GRID, "int8"))
    card = json.loads((tmp_path / "features" / name / "card.json").read_text())
    (environment,) = card["environments"]
    error = environment["storage_error"]
    assert 1e-4 < error["relative_rms"] < 0.02
    assert 0.999 < error["cosine"] <= 1
    cells = card["num_regions"]
    assert error["bytes_per_image"] == cells * card["dim"] + cells * 4
    assert environment["batch_invariance"]["images"] == MEASURED_IMAGES


def test_int8_without_scales_and_a_damaged_card_are_refused(tmp_path: Path) -> None:
    name = extracted(tmp_path, with_storage(GRID, "int8"))
    location = tmp_path / "features" / name / "card.json"
    card = json.loads(location.read_text())
    features = Manifest.open(str(tmp_path)).features(name)
    whole = list(from_table(features.rows(), FeatureRow))
    without = [
        replace(row, parts=tuple(part for part in row.parts if part.name != "scales"))
        for row in whole
    ]
    features.commit(to_table(without, FeatureRow))
    with pytest.raises(FeatureError, match="int8 without scales"):
        Dataset.open(str(tmp_path)).split("train", name)
    features.commit(to_table(whole, FeatureRow))
    location.write_text(json.dumps(card | {"parts": {"scales": 3}}))
    with pytest.raises(FeatureError, match=r"card\.json: not the card of .*parts\.scales"):
        Dataset.open(str(tmp_path)).split("train", name)
