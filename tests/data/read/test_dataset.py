from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.ingest.ingest import IngestConfig, ingest
from pipeline.data.manifest.retention import Retention
from pipeline.data.read.dataset import Dataset, Split
from pipeline.data.sample import TextKind, Texts
from pipeline.data.upkeep.compact import compact
from pipeline.errors import FeatureError, ManifestError, ShardError
from tests.data.tiny_dataset import (
    EXTRACTOR,
    grid_values,
    make_dataset,
    make_image,
    make_texts,
    region_boxes,
    region_values,
)
from tests.data.world import Item, World


def numbers_of(keys: list[str]) -> list[int]:
    return [int(key.removeprefix("sample-")) for key in keys]


def all_keys(split: Split) -> list[str]:
    return [*split.each_key()]


def test_every_live_sample_is_a_row_of_its_split_and_reads_back_whole(tmp_path: Path) -> None:
    make_dataset(str(tmp_path))
    dataset = Dataset.open(str(tmp_path))
    assert dataset.splits() == ["train", "val"]
    assert dataset.split("val").num_samples == 3
    split = dataset.split("train")
    numbers = numbers_of(all_keys(split))
    assert sorted(numbers) == list(range(23))
    assert split.num_samples == 23
    assert split.texts(range(23)) == [make_texts(number) for number in numbers]
    assert [split.image(row) for row in range(23)] == [make_image(number) for number in numbers]
    assert isinstance(split.keys([0])[0], str)


def test_rows_follow_the_shards_and_the_order_within_them(tmp_path: Path) -> None:
    written = make_dataset(str(tmp_path))
    split = Dataset.open(str(tmp_path)).split("train")
    in_train = {name: keys for name, keys in written.shards.items() if "sample-101" not in keys}
    assert all_keys(split) == [key for name in sorted(in_train) for key in in_train[name]]
    starts = split.shard_starts.tolist()
    assert np.diff(starts).tolist() == [len(in_train[name]) for name in sorted(in_train)]
    assert (starts[0], starts[-1]) == (0, 23)


def test_counts_are_those_of_the_texts(tmp_path: Path) -> None:
    make_dataset(str(tmp_path))
    split = Dataset.open(str(tmp_path)).split("train")
    texts = split.texts(range(split.num_samples))

    def counts(kind: TextKind) -> list[int]:
        shards = range(split.num_shards)
        return [count for shard in shards for count in split.counts(kind, shard).tolist()]

    assert counts("captions") == [len(each.captions) for each in texts]
    assert counts("questions") == [len(each.questions) for each in texts]
    assert counts("rounds") == [each.num_rounds for each in texts]
    assert split.counts("captions", 0).dtype == np.int32
    for kind in ("captions", "questions", "rounds"):
        totals = split.totals(kind)
        parts = [split.counts(kind, shard) for shard in range(split.num_shards)]
        assert totals.num_rows.tolist() == [*map(len, parts)]
        assert totals.num_texts.tolist() == [part.sum() for part in parts]
        assert totals.num_rows_with_texts.tolist() == [np.count_nonzero(part) for part in parts]
        assert split.num_texts(kind) == sum(counts(kind))


def test_grid_features_come_as_stored_with_the_cells_as_boxes(tmp_path: Path) -> None:
    make_dataset(str(tmp_path))
    split = Dataset.open(str(tmp_path)).split("train", EXTRACTOR)
    rows = [7, 0, 22, 7]
    batch = split.features(rows)
    assert batch.values.dtype == np.float16
    expected = np.stack([grid_values(number) for number in numbers_of(split.keys(rows))])
    np.testing.assert_array_equal(batch.values, expected)
    assert batch.num_regions.tolist() == [6, 6, 6, 6]
    assert batch.boxes.shape == (4, 6, 4)
    third = 1 / 3
    np.testing.assert_allclose(batch.boxes[2][0], [0, 0, third, 0.5])
    np.testing.assert_allclose(batch.boxes[2][2], [2 * third, 0, 1, 0.5])
    np.testing.assert_allclose(batch.boxes[2][3], [0, 0.5, third, 1])


def test_regions_are_padded_with_zeros_to_the_most_of_the_batch(tmp_path: Path) -> None:
    written = make_dataset(str(tmp_path))
    for shard in written.shards:
        written.add_features(shard, region_values, region_boxes, "regions-77")
    split = Dataset.open(str(tmp_path)).split("train", "regions-77")
    for _ in range(3):  # later reads find the memory of earlier ones full of values
        rows = np.random.default_rng(0).permutation(23)
        batch = split.features(rows)
        assert batch.values.shape == (23, 4, 8)
        for i, number in enumerate(numbers_of(split.keys(rows))):
            count = number % 5
            assert batch.num_regions[i] == count
            np.testing.assert_array_equal(batch.values[i, :count], region_values(number))
            np.testing.assert_array_equal(batch.boxes[i, :count], region_boxes(number))
            assert not batch.values[i, count:].any()
            assert not batch.boxes[i, count:].any()
        del batch
    without_regions = [
        row for row, number in enumerate(numbers_of(all_keys(split))) if number % 5 == 0
    ]
    assert split.features(without_regions).values.shape == (5, 0, 8)


def test_samples_without_features_are_counted_with_the_command_to_run(tmp_path: Path) -> None:
    written = make_dataset(str(tmp_path))
    dataset = Dataset.open(str(tmp_path))
    with pytest.raises(FeatureError, match=r"3 of the 3 live samples of split 'val' .*extract"):
        dataset.split("val", EXTRACTOR)
    written.add_shard("train", [50, 51])
    with pytest.raises(FeatureError, match=r"2 of the 25 live samples of split 'train'"):
        Dataset.open(str(tmp_path)).split("train", EXTRACTOR)
    dataset.split("train", EXTRACTOR)  # the version that was opened lacks none
    with pytest.raises(FeatureError, match="23 of the 23 live samples"):
        dataset.split("train", "nobody-0000")
    with pytest.raises(FeatureError, match="opened without features"):
        dataset.split("train").features([0])


def test_features_of_an_image_that_was_replaced_do_not_count(tmp_path: Path) -> None:
    written = make_dataset(str(tmp_path))
    before = Dataset.open(str(tmp_path))
    shard = written.add_shard("train", [3, 90])
    with pytest.raises(FeatureError, match="2 of the 24 live samples"):
        Dataset.open(str(tmp_path)).split("train", EXTRACTOR)
    written.add_features(shard, lambda number: grid_values(number + 5))
    now = Dataset.open(str(tmp_path)).split("train", EXTRACTOR)
    row = all_keys(now).index("sample-3")
    np.testing.assert_array_equal(now.features([row]).values[0], grid_values(8))
    old = before.split("train", EXTRACTOR)
    row = all_keys(old).index("sample-3")
    np.testing.assert_array_equal(old.features([row]).values[0], grid_values(3))


def test_an_unknown_split_is_refused_with_those_there_are(tmp_path: Path) -> None:
    make_dataset(str(tmp_path))
    with pytest.raises(ManifestError, match=r"split 'tset' .* train, val"):
        Dataset.open(str(tmp_path)).split("tset")
    with pytest.raises(ManifestError, match="no manifest"):
        Dataset.open(str(tmp_path / "nowhere"))


def test_a_shard_cut_short_or_gone_is_named_with_the_sample(tmp_path: Path) -> None:
    make_dataset(str(tmp_path))
    split = Dataset.open(str(tmp_path)).split("train", EXTRACTOR)
    sidecar = sorted((tmp_path / "features" / EXTRACTOR).glob("*.tar"))[0]
    sidecar.write_bytes(sidecar.read_bytes()[:700])
    key = all_keys(split)[0]
    with pytest.raises(ShardError, match=rf"{sidecar.name}: sample '{key}': expected 224 bytes"):
        split.features([0])
    split = Dataset.open(str(tmp_path)).split("train")
    shard = sorted((tmp_path / "shards" / "train").glob("*.tar"))[0]
    shard.unlink()
    with pytest.raises(ShardError, match=f"{shard.name}: the manifest lists this file"):
        split.texts([0])


def test_texts_that_cannot_be_read_are_named_with_shard_and_sample(tmp_path: Path) -> None:
    make_dataset(str(tmp_path))
    shard = sorted((tmp_path / "shards" / "train").glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes().replace(b'{"captions"', b'{,captions"'))
    split = Dataset.open(str(tmp_path)).split("train")
    with pytest.raises(
        ShardError, match=rf"{shard.name}: sample '{all_keys(split)[0]}': .*not JSON"
    ):
        split.texts([0])


def test_a_sidecar_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    make_dataset(str(tmp_path))
    split = Dataset.open(str(tmp_path)).split("train", EXTRACTOR)
    sidecar = sorted((tmp_path / "features" / EXTRACTOR).glob("*.tar"))[0]
    whole = sidecar.read_bytes()
    sidecar.write_bytes(whole.replace(b"<f2", b"<i2"))
    with pytest.raises(FeatureError, match=r"expected an array \(6, 8\) of float16, found .*int16"):
        split.features([0])
    sidecar.write_bytes(whole.replace(b"\x93NUMPY", b"\x93NUMPI"))
    with pytest.raises(FeatureError, match=r"not a \.npy payload"):
        split.features([0])


def test_every_header_is_compared_with_those_that_were_read_before(tmp_path: Path) -> None:
    make_dataset(str(tmp_path))
    split = Dataset.open(str(tmp_path)).split("train", EXTRACTOR)
    rows = np.arange(split.num_samples)
    split.features(rows)
    sidecar = sorted((tmp_path / "features" / EXTRACTOR).glob("*.tar"))[-1]
    whole = sidecar.read_bytes()
    at = whole.rindex(b"<f2")
    sidecar.write_bytes(whole[:at] + b"<i2" + whole[at + 3 :])
    with pytest.raises(
        FeatureError, match=rf"{sidecar.name}: sample '{all_keys(split)[-1]}': .*int16"
    ):
        split.features(rows)
    split.features(rows[:-1])


def test_a_card_that_does_not_fit_the_features_is_refused(tmp_path: Path) -> None:
    written = make_dataset(str(tmp_path))
    written.write_card([3, 3])
    with pytest.raises(FeatureError, match=r"grid has 9 cells .* has 6 regions"):
        Dataset.open(str(tmp_path)).split("train", EXTRACTOR)
    written.write_card(None)
    with pytest.raises(FeatureError, match=r"card\.json: expected a card whose `grid`"):
        Dataset.open(str(tmp_path)).split("train", EXTRACTOR)


def test_threads_may_read_at_once(tmp_path: Path) -> None:
    make_dataset(str(tmp_path))
    split = Dataset.open(str(tmp_path)).split("train", EXTRACTOR)
    numbers = numbers_of(all_keys(split))

    def read(seed: int) -> tuple[np.ndarray, np.ndarray, list[Texts]]:
        rows = np.random.default_rng(seed).integers(0, 23, 16)
        return rows, split.features(rows).values, split.texts(rows)

    with ThreadPoolExecutor(4) as pool:
        for rows, values, texts in pool.map(read, range(100)):
            chosen = [numbers[row] for row in rows]
            np.testing.assert_array_equal(values, np.stack([grid_values(each) for each in chosen]))
            assert texts == [make_texts(each) for each in chosen]


def test_a_dataset_in_an_object_store_reads_alike_through_the_cache(
    tmp_path: Path, object_store: str
) -> None:
    written = make_dataset(object_store, num_samples=11)
    cache = tmp_path / "cache"
    split = Dataset.open(object_store, cache=cache).split("train", EXTRACTOR)
    batch = split.features(range(11))
    expected = np.stack([grid_values(number) for number in numbers_of(all_keys(split))])
    np.testing.assert_array_equal(batch.values, expected)
    assert split.image(2) == make_image(numbers_of(all_keys(split))[2])
    copies = {path.stem for path in cache.rglob("*.tar")}
    assert copies == {name for name, keys in written.shards.items() if "sample-101" not in keys}


def content_after(url: str, world: World) -> str:
    ingest(world, url, IngestConfig(samples_per_shard=3, shards_in_flight=0))
    return Dataset.open(url).content()


def test_content_follows_images_texts_keys_and_splits_and_nothing_else(tmp_path: Path) -> None:
    url = str(tmp_path)
    items = {f"key-{n}": Item(n, f"caption {n}") for n in range(10)}
    first = content_after(url, World(dict(items)))
    version = Dataset.open(url).version
    touched = {key: replace(item, touched=1) for key, item in items.items()}
    assert content_after(url, World(dict(reversed(touched.items())))) == first
    assert content_after(str(tmp_path / "again"), World(dict(items))) == first
    changed = [
        content_after(url, World(items | {"key-3": replace(items["key-3"], **change)}))
        for change in ({"caption": "edited"}, {"picture": 77}, {"split": "val"})
    ]
    changed.append(content_after(url, World({k: v for k, v in items.items() if k != "key-3"})))
    changed.append(content_after(url, World(items | {"key-10": Item(10, "new")})))
    assert len({first, *changed}) == 6
    assert content_after(url, World(dict(items))) == first
    compact(url, Retention(last_versions=1, min_age_hours=0))
    assert Dataset.open(url).version > version
    assert Dataset.open(url).content() == first


def test_content_of_a_split_does_not_follow_the_others(tmp_path: Path) -> None:
    url = str(tmp_path)
    items = {f"key-{n}": Item(n, "a", split="val" if n > 6 else "train") for n in range(10)}
    whole = content_after(url, World(dict(items)))
    train, val = (Dataset.open(url).content(split) for split in ("train", "val"))
    assert len({whole, train, val}) == 3
    content_after(url, World(items | {"key-9": replace(items["key-9"], caption="edited")}))
    assert Dataset.open(url).content("train") == train
    assert Dataset.open(url).content("val") != val
