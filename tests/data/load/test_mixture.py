from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.load.loader import Loader
from pipeline.data.load.mixture import BLOCK_SIZE, MixedOrder, MixedSplit, quotas
from pipeline.data.load.order import Order
from pipeline.data.media.augmentation import AugmentConfig
from pipeline.data.read.dataset import Dataset, Split
from pipeline.data.read.features import FeatureBatch
from pipeline.data.read.images import ImageConfig, LiveConfig
from pipeline.errors import ConfigError, FeatureError
from tests.data.load.test_loader import fingerprints
from tests.data.read.test_images import jpeg
from tests.data.tiny_dataset import EXTRACTOR, TinyDataset, grid_values

SEED = 6


def write(url: str, numbers: range, samples_per_shard: int, regions: int = 6) -> Split:
    """A split of photographs, each with `regions` rows of features."""
    written = TinyDataset(url, image=jpeg)
    written.write_card([1, regions])
    for start in range(numbers.start, numbers.stop, samples_per_shard):
        shard = written.add_shard(
            "train", range(start, min(start + samples_per_shard, numbers.stop))
        )
        written.add_features(shard, lambda number: grid_values(number)[:regions])
    return Dataset.open(url).split("train", EXTRACTOR)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> list[Split]:
    """9, 23 and 5 samples with 12, 33 and 8 captions."""
    folder = tmp_path_factory.mktemp("mixed")
    sizes = (range(1, 10), range(100, 123), range(200, 206))
    return [write(str(folder / str(i)), numbers, 4) for i, numbers in enumerate(sizes)]


def mix(
    splits: list[Split], weights: tuple[float, ...] = (1, 2, 1), seed: int = SEED
) -> MixedOrder:
    orders = [Order(split, "captions", seed, window_shards=2) for split in splits]
    return MixedOrder(MixedSplit(splits), orders, weights, seed)


def origin(order_rows: np.ndarray, split: MixedSplit) -> np.ndarray:
    return np.searchsorted(split.first_rows, order_rows, side="right") - 1


def test_every_stretch_of_a_block_is_mixed_by_weight(splits: list[Split]) -> None:
    split = MixedSplit(splits)
    order = mix(splits, (1, 2, 5))
    for start in (0, 3 * BLOCK_SIZE):
        found = origin(order.between(start, start + BLOCK_SIZE).rows, split)
        assert np.bincount(found).tolist() == [512, 1024, 2560]
        assert np.bincount(found[:800]) / 800 == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.06)


def test_each_split_is_met_in_its_own_order(splits: list[Split]) -> None:
    split, order = MixedSplit(splits), mix(splits)
    found = order.between(0, 2 * BLOCK_SIZE + 100)
    sources = origin(found.rows, split)
    for number, own in enumerate(splits):
        chosen = sources == number
        expected = Order(own, "captions", SEED, window_shards=2).between(0, int(chosen.sum()))
        first_row = split.first_rows[number]
        np.testing.assert_array_equal(found.rows[chosen], expected.rows + first_row)
        np.testing.assert_array_equal(found.text_index[chosen], expected.text_index)
        np.testing.assert_array_equal(found.distractors[chosen], expected.distractors + first_row)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 3 * BLOCK_SIZE), st.integers(1, 300))
def test_a_stretch_computed_directly_equals_that_of_the_stream(
    splits: list[Split], start: int, size: int
) -> None:
    whole = mix(splits).between(0, 3 * BLOCK_SIZE + 300)
    part = mix(splits).between(start, start + size)
    np.testing.assert_array_equal(part.rows, whole.rows[start : start + size])
    np.testing.assert_array_equal(part.text_index, whole.text_index[start : start + size])


def test_seeds_mix_differently_and_the_mixture_never_changes_between_releases(
    splits: list[Split],
) -> None:
    split = MixedSplit(splits)
    found = [origin(mix(splits, seed=seed).between(0, 40).rows, split) for seed in (6, 7)]
    assert found[0].tolist() != found[1].tolist()
    assert found[0][:12].tolist() == [0, 1, 1, 1, 0, 1, 2, 1, 1, 2, 1, 0]


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2 * BLOCK_SIZE))
def test_a_window_holds_the_shards_that_are_read_until_it_ends(
    splits: list[Split], position: int
) -> None:
    split, order = MixedSplit(splits), mix(splits)
    shards, end = order.window(position)
    assert position < end
    starts = np.concatenate(
        [own.shard_starts[:-1] + split.first_rows[i] for i, own in enumerate(splits)]
    )
    read = np.searchsorted(starts, order.between(position, end).rows, side="right") - 1
    assert set(read.tolist()) <= set(shards.tolist())


@pytest.mark.parametrize("is_live", [False, True])
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 4), (2, 3), (4, 3)])
def test_ranks_and_resumed_runs_see_the_same_mixed_batches(
    splits: list[Split], world_size: int, micro_batch_size: int, is_live: bool
) -> None:
    if is_live:
        images = ImageConfig(size=7, augment=AugmentConfig())
        live = LiveConfig(images=images, grid=(1, 3), patches=False)
        splits = [Dataset.open(split.url).split("train", live) for split in splits]
    split = MixedSplit(splits)

    def seen(start: int, world_size: int, micro_batch_size: int) -> list[list[object]]:
        loader = Loader(split, mix(splits), global_batch_size=12, seed=SEED, distractors=True)
        ranks = [
            loader.batches(start, 6, rank, world_size, micro_batch_size)
            for rank in range(world_size)
        ]
        return [
            [example for share in shares for batch in share for example in fingerprints(batch)]
            for shares in zip(*ranks, strict=True)
        ]

    whole = seen(0, 1, 12)
    assert all(len(step) == 12 for step in whole)
    assert seen(2, world_size, micro_batch_size) == whole[2:]


def features_of(split: MixedSplit, rows: np.ndarray) -> FeatureBatch:
    found = split.read(rows).features
    assert found is not None
    return found


def test_batches_hold_what_the_splits_have(splits: list[Split]) -> None:
    split = MixedSplit(splits)
    rows = np.array([30, 0, 36, 31, 8, 9])
    own = [(1, 21), (0, 0), (2, 4), (1, 22), (0, 8), (1, 0)]
    assert split.keys(rows) == [splits[part].keys([row])[0] for part, row in own]
    numbers = [int(key.removeprefix("sample-")) for key in split.keys(rows)]
    assert [texts.image_id for texts in split.texts(rows)] == numbers
    np.testing.assert_array_equal(
        features_of(split, rows).values, np.stack([grid_values(number) for number in numbers])
    )


def test_splits_with_other_numbers_of_regions_are_padded_and_with_other_kinds_refused(
    splits: list[Split], tmp_path: Path
) -> None:
    narrow = write(str(tmp_path / "narrow"), range(300, 305), 4, regions=2)
    mixed = MixedSplit([splits[0], narrow])
    found = features_of(mixed, np.array([9, 0, 10]))
    assert found.num_regions.tolist() == [2, 6, 2]
    np.testing.assert_array_equal(found.values[0, :2], grid_values(300)[:2])
    np.testing.assert_array_equal(found.values[1], grid_values(1))
    assert not found.values[[0, 2], 2:].any()
    assert not found.boxes[[0, 2], 2:].any()
    other = TinyDataset(str(tmp_path / "other"))
    other.write_card([2, 3])
    other.add_features(other.add_shard("train", [1, 2]), lambda n: grid_values(n)[:, :5])
    wrong = MixedSplit([splits[0], Dataset.open(other.url).split("train", EXTRACTOR)])
    with pytest.raises(FeatureError, match="different values"):
        wrong.read(np.array([0, 9]))
    without = Dataset.open(other.url).split("train")
    with pytest.raises(ConfigError, match="all or none"):
        MixedSplit([splits[0], without])


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9))
def test_every_weight_gets_its_share_of_places_and_at_least_one(weights: list[float]) -> None:
    shares = quotas(weights, 100)
    assert shares.sum() == 100
    assert shares.min() >= 1
    exact = np.array(weights) / sum(weights) * 100
    large = exact >= 10
    assert (abs(shares - exact)[large] < len(weights)).all()


def test_weights_that_cannot_be_are_refused(splits: list[Split]) -> None:
    for weights in ((1, 0, 1), (1, -1, 1), (1, float("nan"), 1), ()):
        with pytest.raises(ConfigError, match="positive numbers"):
            mix(splits, weights)
    with pytest.raises(ConfigError, match="3 splits are mixed by 2 weights"):
        mix(splits, (1, 2))
