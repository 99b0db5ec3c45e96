from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.read.dataset import Dataset
from pipeline.errors import ConfigError, FeatureError
from pipeline.vision.compress.pca import PcaConfig, digest, fit, load, sample_images, save
from pipeline.vision.extract import ExtractConfig, extract
from pipeline.vision.extractors.grid import GridConfig
from pipeline.vision.extractors.registry import from_card
from tests.vision.photo_dataset import make_dataset, picture, pictures

HERE = ExtractConfig(actors=0, batch_size=3)
GRID = GridConfig(network="squeezenet1_0", node="features.2", weights="random", image_size=32)
CELLS, DIM = 36, 96


def reduced(folder: Path, **change: Any) -> GridConfig:
    settings = {"dims": 10, "matrix": str(folder / "pca.safetensors"), "images": 5} | change
    return GRID.model_copy(update={"pca": PcaConfig(**settings)})


def rows(seed: int = 0, count: int = 200) -> np.ndarray:
    """Vectors (count, 7) that lie near to a plane away from the origin."""
    random = np.random.default_rng(seed)
    plane = random.standard_normal((count, 2)) @ random.standard_normal((2, 7))
    found: np.ndarray = (plane + 3 + 0.01 * random.standard_normal((count, 7))).astype(np.float32)
    return found


def test_what_lies_in_a_plane_comes_back_from_two_dimensions() -> None:
    values = rows()
    projection, fitted = fit([values[:90], values[90:]], 2)
    reached = projection.restore(projection.project(values))
    assert np.abs(reached - values).max() < 0.06
    assert fitted.variance_kept > 0.999
    assert (fitted.images, fitted.vectors) == (2, 200)
    np.testing.assert_allclose(
        projection.components @ projection.components.T, np.eye(2), atol=1e-5
    )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), cut=st.integers(1, 199))
def test_components_do_not_depend_on_how_rows_are_divided_or_ordered(seed: int, cut: int) -> None:
    values = rows(seed)
    whole, _ = fit([values], 2)
    parts, _ = fit([values[cut:], values[:cut]], 2)
    np.testing.assert_allclose(parts.components, whole.components, atol=1e-4)
    largest = np.take_along_axis(
        whole.components, np.abs(whole.components).argmax(axis=1)[:, None], axis=1
    )
    assert (largest > 0).all()


def test_more_dimensions_than_can_be_had_are_refused() -> None:
    for found, dims in (([rows()], 8), ([rows()[:3]], 3), ([], 1)):
        with pytest.raises(ConfigError, match=f"dims={dims}"):
            fit(found, dims)


def test_a_matrix_comes_back_from_its_file(tmp_path: Path) -> None:
    projection, fitted = fit([rows()], 3)
    location = str(tmp_path / "m.safetensors")
    save(location, projection, fitted)
    found, about = load(location)
    assert digest(found) == digest(projection)
    assert about == fitted
    (tmp_path / "other.safetensors").write_bytes(b"no matrix at all")
    with pytest.raises(FeatureError, match="expected a matrix"):
        load(str(tmp_path / "other.safetensors"))
    with pytest.raises(FeatureError, match="sightline extract RECIPE"):
        load(str(tmp_path / "absent.safetensors"))


def test_the_sample_is_of_the_keys_however_they_lie_in_shards(tmp_path: Path) -> None:
    images = pictures(12)
    for name, per_shard in (("a", 3), ("b", 12)):
        make_dataset(str(tmp_path / name), images, samples_per_shard=per_shard)
    first, again = (list(sample_images(str(tmp_path / name), 5)) for name in "ab")
    assert first == again
    assert len(set(first)) == 5
    assert set(first) < set(images.values())
    assert list(sample_images(str(tmp_path / "a"), 3)) == first[:3]


def test_extract_fits_once_and_a_split_reads_what_the_matrix_makes(tmp_path: Path) -> None:
    url, config = str(tmp_path / "data"), reduced(tmp_path)
    make_dataset(url, pictures(7))
    with pytest.raises(FeatureError, match="no such file"):
        config.build()
    report = extract(url, config, HERE)
    assert report.card.dim == 10
    pca = report.card.pca
    assert pca is not None
    assert (pca.dims, pca.images, pca.vectors) == (10, 5, 5 * CELLS)
    projection, _ = load(str(tmp_path / "pca.safetensors"))
    assert pca.digest == digest(projection)
    split = Dataset.open(url).split("train", report.extractor)
    batch = split.features(range(7))
    exact = GRID.build().exact()
    for row, key in enumerate([*split.each_key()]):
        (full,) = exact.extract([exact.prepare(pictures(7)[key])])
        np.testing.assert_allclose(
            batch.values[row],
            projection.project(full.values),
            atol=2e-3 * np.abs(full.values).max(),
        )
    loss = report.card.environments[0].storage_error
    assert loss is not None
    assert 0.001 < loss.relative_rms < 0.9  # against all dimensions
    assert loss.bytes_per_image == CELLS * 10 * 2

    matrix = (tmp_path / "pca.safetensors").read_bytes()
    make_dataset(url, pictures(9))
    again = extract(url, config, HERE)
    assert (again.extractor, again.num_unchanged) == (report.extractor, 7)
    assert (tmp_path / "pca.safetensors").read_bytes() == matrix


def test_the_same_sample_gives_the_same_matrix(tmp_path: Path) -> None:
    for name in "ab":
        url = str(tmp_path / name / "data")
        make_dataset(url, pictures(6))
        extract(url, reduced(tmp_path / name), HERE)
    first, second = ((tmp_path / name / "pca.safetensors").read_bytes() for name in "ab")
    assert first == second


@pytest.mark.parametrize("stored", ["float32", "int8", "int8-per-channel"])
def test_reduced_values_are_stored_in_every_form(tmp_path: Path, stored: Any) -> None:
    url = str(tmp_path / "data")
    make_dataset(url, pictures(5))
    config = reduced(tmp_path).model_copy(update={"storage": stored, "fit": "crop"})
    report = extract(url, config, HERE)
    split = Dataset.open(url).split("train", report.extractor)
    extractor = from_card(report.card)
    assert extractor.name == report.extractor
    (expected,) = extractor.extract([extractor.prepare(split.image(2))])
    batch = split.features([2])
    np.testing.assert_allclose(batch.values[0], expected.values, atol=1e-5)
    assert expected.boxes is not None
    np.testing.assert_array_equal(batch.boxes[0], expected.boxes)


def test_identity_is_of_the_matrix_and_not_of_its_file(tmp_path: Path) -> None:
    url = str(tmp_path / "data")
    make_dataset(url, pictures(6))
    name = extract(url, reduced(tmp_path), HERE).extractor
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((tmp_path / "pca.safetensors").read_bytes())
    assert reduced(tmp_path, matrix=str(copy)).build().name == name != GRID.build().name
    other = str(tmp_path / "other.safetensors")
    changed = extract(url, reduced(tmp_path, matrix=other, images=4), HERE)
    assert changed.extractor != name
    with pytest.raises(FeatureError, match=r"pca\.dims is 9"):
        reduced(tmp_path, dims=9).build()


def test_a_feature_of_a_picture_alone_is_that_of_a_batch(tmp_path: Path) -> None:
    url = str(tmp_path / "data")
    make_dataset(url, pictures(6))
    extract(url, reduced(tmp_path), HERE)
    extractor = reduced(tmp_path).build()
    prepared = [extractor.prepare(picture(number)) for number in range(4)]
    together = extractor.extract(prepared)
    for image, feature in zip(prepared, together, strict=True):
        (alone,) = extractor.extract([image])
        np.testing.assert_allclose(alone.values, feature.values, atol=2e-2)
