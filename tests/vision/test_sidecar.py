import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import webdataset

from pipeline.data.manifest.schema import FeatureRow, from_table
from pipeline.data.read.extractor_card import ExtractorCard
from pipeline.data.tars.shard_files import ShardFiles, default_cache
from pipeline.errors import FeatureError, ShardError
from pipeline.vision.extractor import Extractor
from pipeline.vision.extractors.grid import GridConfig
from pipeline.vision.extractors.pixels import PixelsConfig
from pipeline.vision.feature import Feature
from pipeline.vision.preprocess.image import Prepared
from pipeline.vision.sidecar import SidecarPlan, prepared_images, shard_images, write_sidecar
from tests.vision.photo_dataset import make_dataset, pictures

PIXELS = PixelsConfig(image_size=12, patch_size=4).build()


def plans(url: Path, live: set[str] | None = None) -> list[SidecarPlan]:
    return [
        SidecarPlan(str(url), "train", path.stem, frozenset(live or members(path)))
        for path in sorted((url / "shards" / "train").glob("*.tar"))
    ]


def members(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return [name.partition(".")[0] for name in tar.getnames() if name.endswith("json")]


def files() -> ShardFiles:
    return ShardFiles(default_cache())


def write(plan: SidecarPlan, extractor: Extractor = PIXELS, batch_size: int = 3) -> Path:
    write_sidecar(extractor, plan, files(), batch_size, threads=2)
    return Path(plan.url) / "features" / extractor.name / f"{plan.shard}.tar"


def test_plain_webdataset_reads_images_and_features_in_lockstep(tmp_path: Path) -> None:
    images = pictures(7)
    make_dataset(str(tmp_path), images, samples_per_shard=7)
    (plan,) = plans(tmp_path)
    sidecar = write(plan)
    samples = webdataset.WebDataset(plan.location(), shardshuffle=False)
    features = webdataset.WebDataset(str(sidecar), shardshuffle=False).decode()
    seen = {}
    for sample, feature in zip(samples, features, strict=True):
        assert sample["__key__"] == feature["__key__"]
        seen[sample["__key__"]] = feature["npy"]
    assert set(seen) == set(images)
    for key, image in images.items():
        (expected,) = PIXELS.extract([PIXELS.prepare(image)])
        np.testing.assert_array_equal(seen[key], expected.values)


def test_rows_say_where_each_array_lies(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), pictures(5), samples_per_shard=5)
    extractor = GridConfig(
        network="squeezenet1_0", node="features.2", weights="random", image_size=32, fit="crop"
    ).build()
    (plan,) = plans(tmp_path)
    found = write_sidecar(extractor, plan, files(), batch_size=2, threads=1)
    payload = (tmp_path / "features" / extractor.name / f"{plan.shard}.tar").read_bytes()
    for row in from_table(found.rows, FeatureRow):
        parts = {part.name: part for part in row.parts}
        for name, shape in (("values", (36, 96)), ("boxes", (36, 4))):
            start, size = parts[name].offset, parts[name].size
            array = np.load(io.BytesIO(payload[start : start + size]), allow_pickle=False)
            assert array.shape == shape
        assert row.num_regions == 36
    assert found.size_bytes == len(payload)
    assert 0 < found.network_seconds <= found.seconds


@pytest.mark.parametrize("extractor", ["pixels", "grid"])
def test_same_shard_gives_the_same_bytes_again(tmp_path: Path, extractor: str) -> None:
    make_dataset(str(tmp_path), pictures(5), samples_per_shard=5)
    (plan,) = plans(tmp_path)
    grid = GridConfig(network="squeezenet1_0", node="features", weights="random", image_size=64)
    build = grid.build if extractor == "grid" else PixelsConfig().build
    first = write(plan, build()).read_bytes()
    assert write(plan, build()).read_bytes() == first


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5])
def test_pixels_do_not_depend_on_the_batch_size(tmp_path: Path, batch_size: int) -> None:
    make_dataset(str(tmp_path), pictures(4), samples_per_shard=4)
    (plan,) = plans(tmp_path)
    reference = write(plan, batch_size=3).read_bytes()
    assert write(plan, batch_size=batch_size).read_bytes() == reference


def cut_short(images: dict[str, bytes], key: str) -> dict[str, bytes]:
    return images | {key: images[key][:-60]}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_an_image_of_which_nothing_can_be_made_is_listed_with_the_reason(
    tmp_path: Path, batch_size: int
) -> None:
    images = cut_short(cut_short(pictures(5), "photo-3"), "photo-0")
    make_dataset(str(tmp_path), images, samples_per_shard=5)
    (plan,) = plans(tmp_path)
    written = write_sidecar(PIXELS, plan, files(), batch_size, threads=2)
    rows = {row["key"]: row for row in written.rows.to_pylist()}
    assert {key: row["reason"] for key, row in rows.items()} == {
        "photo-0": "truncated-image",
        "photo-1": None,
        "photo-2": None,
        "photo-3": "truncated-image",
        "photo-4": None,
    }
    assert "bytes" in rows["photo-3"]["detail"]
    with tarfile.open(tmp_path / "features" / PIXELS.name / f"{plan.shard}.tar") as tar:
        assert sorted(tar.getnames()) == [f"photo-{number}.npy" for number in (1, 2, 4)]


def test_a_shard_of_which_nothing_can_be_made_has_no_sidecar(tmp_path: Path) -> None:
    images = {key: image[:-60] for key, image in pictures(3).items()}
    make_dataset(str(tmp_path), images)
    (plan,) = plans(tmp_path)
    written = write_sidecar(PIXELS, plan, files(), 2, threads=2)
    assert written.rows["reason"].to_pylist() == ["truncated-image"] * 3
    assert written.size_bytes == 0
    assert list((tmp_path / "features" / PIXELS.name).iterdir()) == []


def test_undecodable_image_that_is_no_longer_live_has_no_feature(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), cut_short(pictures(5), "photo-3"), samples_per_shard=5)
    (plan,) = plans(tmp_path, live={"photo-0", "photo-1"})
    with tarfile.open(write(plan)) as tar:
        assert sorted(tar.getnames()) == [f"photo-{number}.npy" for number in (0, 1, 2, 4)]
    assert len(prepared_images(PIXELS, [plan], files(), 9)) == 2
    (plan,) = plans(tmp_path)
    assert len(prepared_images(PIXELS, [plan, plan], files(), 9)) == 2 * 4
    assert len(prepared_images(PIXELS, [plan, plan], files(), 5)) == 5


@pytest.mark.parametrize("size_bytes", [600, 4096, 4608, 5000])
def test_shard_that_was_cut_short_is_named(tmp_path: Path, size_bytes: int) -> None:
    make_dataset(str(tmp_path), pictures(5), samples_per_shard=5)
    (plan,) = plans(tmp_path)
    path = Path(plan.location())
    path.write_bytes(path.read_bytes()[:size_bytes])
    with pytest.raises(ShardError, match=plan.shard):
        write(plan)
    assert list((tmp_path / "features" / PIXELS.name).iterdir()) == []


class FailingExtractor:
    """Pixels, until the second batch."""

    name = PIXELS.name

    def __init__(self) -> None:
        self._batches = 0

    def card(self) -> ExtractorCard:
        return PIXELS.card()

    def prepare(self, image: bytes) -> Prepared:
        return PIXELS.prepare(image)

    def extract(self, prepared: Sequence[Prepared]) -> list[Feature]:
        self._batches += 1
        if self._batches == 2:
            raise FeatureError("values do not fit")
        return PIXELS.extract(prepared)

    def exact(self) -> Self:
        return self


def test_a_shard_with_a_damaged_header_is_never_read_in_part(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), pictures(4), samples_per_shard=4)
    (plan,) = plans(tmp_path)
    shard = Path(plan.location())
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        header = tar.getmembers()[4].offset
    flipped = bytearray(whole)
    flipped[header + 150] ^= 1
    lost = whole[:header] + bytes(512) + whole[header + 512 :]
    for damaged in (bytes(flipped), lost, whole[:header], whole[: header + 100], whole + whole):
        shard.write_bytes(damaged)
        with pytest.raises(ShardError, match=rf"{shard.name}: cannot be read \(.*found"):
            list(shard_images(plan, files()))
        with pytest.raises(ShardError, match="cannot be read"):
            write(plan)
    shard.write_bytes(whole)
    assert len(list(shard_images(plan, files()))) == 4


def test_failing_network_stops_the_shard_and_names_the_samples(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), pictures(5), samples_per_shard=5)
    (plan,) = plans(tmp_path)
    keys = [key for key, _ in shard_images(plan, files())]
    with pytest.raises(FeatureError, match=f"samples '{keys[3]}' to '{keys[4]}': values do not"):
        write(plan, FailingExtractor())
    assert list((tmp_path / "features" / PIXELS.name).iterdir()) == []
