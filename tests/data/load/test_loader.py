import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import storage
from pipeline.data.load.loader import Batch, BatchConfig, Loader, eval_batches
from pipeline.data.load.order import Order
from pipeline.data.media.augmentation import AugmentConfig
from pipeline.data.read.dataset import Dataset, Reading, Split, TextKind
from pipeline.data.read.images import ImageConfig, LiveConfig, live_features
from pipeline.data.read.rows import Rows
from pipeline.errors import ConfigError, ShardError
from tests.data.read.test_images import jpeg
from tests.data.tiny_dataset import EXTRACTOR, TinyDataset, grid_values, make_dataset, make_texts

SEED = 9


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Train split of 23 samples, 33 captions, six shards, with grid features."""
    url = str(tmp_path_factory.mktemp("dataset"))
    make_dataset(url)
    return Dataset.open(url).split("train", EXTRACTOR)


@pytest.fixture(autouse=True)
def _no_thread_outlives_its_test() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if "sightline" in thread.name]


def make_loader(split: Split, global_batch_size: int, distractors: bool = True) -> Loader:
    order = Order(split, "captions", seed=SEED, window_shards=2)
    return Loader(
        split, order, global_batch_size=global_batch_size, seed=SEED, distractors=distractors
    )


def fingerprints(batch: Batch) -> list[tuple[object, ...]]:
    """Everything a model could see of each example, and a draw of its random numbers."""
    assert batch.features is not None
    return [
        (
            batch.step,
            int(batch.positions[i]),
            batch.keys[i],
            int(batch.rows[i]),
            batch.texts[i],
            int(batch.text_index[i]),
            batch.distractors[i] if batch.distractors else None,
            batch.features.values[i].tobytes(),
            batch.features.boxes[i].tobytes(),
            float(batch.rng(i, 3).random()),
        )
        for i in range(len(batch.keys))
    ]


def seen(loader: Loader, start: int, stop: int, world_size: int, micro: int) -> list[object]:
    """The examples of each step as all ranks together see them."""
    ranks = [loader.batches(start, stop, rank, world_size, micro) for rank in range(world_size)]
    return [
        [example for share in shares for batch in share for example in fingerprints(batch)]
        for shares in zip(*ranks, strict=True)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 5])
def test_ranks_and_micro_batches_only_divide_the_same_global_batches(
    split: Split, world_size: int, micro_batch_size: int
) -> None:
    loader = make_loader(split, 36)  # more than an epoch of 33
    whole = seen(loader, 0, 3, world_size=1, micro=36)
    assert seen(loader, 0, 3, world_size, micro_batch_size) == whole


def test_each_micro_batch_has_its_size_and_consecutive_positions(split: Split) -> None:
    shares = list(make_loader(split, 24).batches(5, 7, rank=1, world_size=2, micro_batch_size=4))
    assert [[batch.positions.tolist() for batch in share] for share in shares] == [
        [[12, 13, 14, 15], [16, 17, 18, 19], [20, 21, 22, 23]]
    ] * 2
    assert [[batch.step for batch in share] for share in shares] == [[5] * 3, [6] * 3]
    assert {batch.seed for share in shares for batch in share} == {SEED}


@pytest.mark.parametrize(("size", "world_size", "micro"), [(24, 5, 2), (23, 4, 4), (7, 4, 1)])
def test_shares_and_micro_batches_that_cannot_be_equal_differ_by_one_sample(
    split: Split, size: int, world_size: int, micro: int
) -> None:
    loader = make_loader(split, size)
    ranks = [
        [len(batch.keys) for batch in next(loader.batches(0, 1, rank, world_size, micro))]
        for rank in range(world_size)
    ]
    shares = [sum(sizes) for sizes in ranks]
    assert sum(shares) == size
    assert max(shares) - min(shares) == 1
    assert all(max(sizes) - min(sizes) <= 1 for sizes in ranks)
    assert max(map(max, ranks)) <= micro
    passes = BatchConfig(global_batch_size=size, micro_batch_size=micro).accumulation_steps
    assert max(map(len, ranks)) == passes(world_size)
    assert micro == 1 or len(set(map(len, ranks))) == 1


def test_an_epoch_holds_every_caption_exactly_once(split: Split) -> None:
    loader = make_loader(split, 11)
    for epoch in range(2):
        captions = [
            batch.texts[i].captions[batch.text_index[i]]
            for (batch,) in loader.batches(3 * epoch, 3 * epoch + 3, 0, 1, 11)
            for i in range(11)
        ]
        numbers = range(23)
        assert sorted(captions) == sorted(c for n in numbers for c in make_texts(n).captions)


def test_a_run_that_resumes_sees_what_the_unbroken_run_sees(split: Split) -> None:
    unbroken = seen(make_loader(split, 8), 0, 12, world_size=2, micro=2)
    for step in (1, 5, 11):
        assert seen(make_loader(split, 8), step, 12, world_size=1, micro=4) == unbroken[step:]


def test_examples_are_the_same_however_their_places_are_cut(split: Split) -> None:
    loader = make_loader(split, 8)
    assert loader.num_examples == 33

    def found(*places: range) -> list[object]:
        return [example for batch in loader.at(places, step=4) for example in fingerprints(batch)]

    whole = found(range(33))
    assert found(range(5), range(5, 6), range(6, 31), range(31, 33)) == whole
    keys_and_texts = [(example[2], example[5]) for example in whole]  # type: ignore[index]
    assert len(set(keys_and_texts)) == 33
    assert {example[0] for example in whole} == {4}  # type: ignore[index]


def test_batches_hold_the_texts_and_features_of_their_rows(split: Split) -> None:
    for (batch,) in make_loader(split, 7).batches(0, 9, 0, 1, 7):
        assert batch.features is not None
        assert split.keys(batch.rows) == batch.keys
        numbers = [int(key.removeprefix("sample-")) for key in batch.keys]
        captions = [make_texts(number).captions for number in numbers]
        assert [texts.captions for texts in batch.texts] == captions
        assert not any(texts.questions or texts.dialogs for texts in batch.texts)
        assert all(i < number % 4 for i, number in zip(batch.text_index, numbers, strict=True))
        np.testing.assert_array_equal(
            batch.features.values, np.stack([grid_values(number) for number in numbers])
        )
        others = [each.image_id for each in batch.distractors]
        assert all(other != number for other, number in zip(others, numbers, strict=True))
        assert all(each.captions for each in batch.distractors)


def test_batches_that_are_kept_are_never_overwritten(split: Split) -> None:
    loader = make_loader(split, 6)
    kept = list(loader.batches(0, 40, 0, 1, 6))
    for (batch,) in kept:
        numbers = [int(key.removeprefix("sample-")) for key in batch.keys]
        assert batch.features is not None
        np.testing.assert_array_equal(
            batch.features.values, np.stack([grid_values(number) for number in numbers])
        )


def test_distractors_and_features_are_left_out_where_not_asked_for(split: Split) -> None:
    without = Dataset.open(split.url).split("train")
    ((batch,),) = make_loader(without, 6, distractors=False).batches(0, 1, 0, 1, 6)
    assert batch.distractors == []
    assert batch.features is None


def test_random_numbers_differ_between_examples_steps_seeds_and_salts(split: Split) -> None:
    ((first,), (second,)) = make_loader(split, 5).batches(0, 2, 0, 1, 5)
    draws = [
        first.rng(i, *salt).random() for i in range(5) for salt in ((), (0,), (0, 0), (1,), (1, 0))
    ]
    draws += [second.rng(i).random() for i in range(5)]
    order = Order(split, "captions", SEED)
    ((other,),) = Loader(split, order, global_batch_size=5, seed=8).batches(0, 1, 0, 1, 5)
    draws += [other.rng(0).random()]
    assert len(set(draws)) == len(draws)
    assert first.rng(2, 7).random() == first.rng(2, 7).random()


def test_closing_early_ends_the_threads(split: Split) -> None:
    batches = make_loader(split, 4).batches(0, 1_000_000_000, 0, 1, 4)
    next(batches)
    assert any("loader" in thread.name for thread in threading.enumerate())
    batches.close()
    assert not any("loader" in thread.name for thread in threading.enumerate())


def test_an_iterator_that_is_dropped_or_never_started_leaves_no_thread(split: Split) -> None:
    loader = make_loader(split, 4)
    loader.batches(0, 10, 0, 1, 4)
    for _ in loader.batches(0, 10, 0, 1, 4):
        break


def test_no_more_than_the_bound_is_read_ahead(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Rows] = []
    read = split.read

    def counted(rows: Rows, *how: Any) -> Reading:
        reads.append(rows)
        return read(rows, *how)

    monkeypatch.setattr(split, "read", counted)
    order = Order(split, "captions", SEED)
    loader = Loader(split, order, global_batch_size=4, seed=SEED, threads=3, prefetch=5)
    batches = loader.batches(0, 100, 0, 1, 4)
    next(batches)
    time.sleep(0.2)
    assert len(reads) == 6
    batches.close()


def test_a_read_error_is_raised_at_its_step_with_shard_and_key(tmp_path: Path) -> None:
    written = TinyDataset(str(tmp_path))
    written.write_card([2, 3])
    shards = [written.add_shard("train", range(n, n + 4)) for n in (1, 11, 21, 31, 41)]
    for shard in shards:
        written.add_features(shard, grid_values)
    split = Dataset.open(str(tmp_path)).split("train", EXTRACTOR)
    order = Order(split, "captions", SEED, window_shards=1)
    broken = max(shards, key=lambda shard: first_step(order, split, written.shards[shard]))
    step = first_step(order, split, written.shards[broken])
    assert step > 4
    path = tmp_path / "features" / EXTRACTOR / f"{broken}.tar"
    path.write_bytes(path.read_bytes()[:600])

    done = []
    loader = Loader(split, order, global_batch_size=2, seed=SEED, threads=4, prefetch=6)
    with pytest.raises(ShardError, match=rf"{broken}\.tar: sample 'sample-\d+': expected") as error:
        for (batch,) in loader.batches(0, 100, 0, 1, 2):
            done.append(batch.step)
    assert done == list(range(step))
    assert any(key in str(error.value) for key in written.shards[broken])


def first_step(order: Order, split: Split, keys: list[str]) -> int:
    """The first step, of two examples, that needs one of the samples."""
    for step in range(order.num_examples):
        rows, _ = order.examples(step, 2)
        if set(split.keys(rows)) & set(keys):
            return step
    raise AssertionError(keys)


def test_a_batch_that_cannot_be_divided_is_refused_before_anything_is_read(split: Split) -> None:
    with pytest.raises(ConfigError, match="global_batch_size=8 leaves some of 9 ranks without"):
        make_loader(split, 8).batches(0, 1, 0, 9, 1)
    with pytest.raises(ConfigError, match="33 examples, fewer than the 40 ranks"):
        make_loader(split, 40).batches(0, 1, 0, 40, 1)
    assert BatchConfig(global_batch_size=24, micro_batch_size=4).accumulation_steps(3) == 2


def test_distractors_need_a_second_sample_with_texts(tmp_path: Path) -> None:
    written = TinyDataset(str(tmp_path))
    written.add_shard("train", [1, 4, 8])  # of which only the first has captions
    split = Dataset.open(str(tmp_path)).split("train")
    with pytest.raises(ConfigError, match="texts of one sample only"):
        make_loader(split, 2)
    assert len(list(make_loader(split, 2, distractors=False).batches(0, 1, 0, 1, 2))) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_an_evaluation_meets_every_example_once_in_row_order(
    split: Split, batch_size: int, world_size: int
) -> None:
    batches = [
        batch
        for rank in range(world_size)
        for batch in eval_batches(split, "questions", batch_size, rank, world_size)
    ]
    assert max(len(batch.keys) for batch in batches) <= batch_size
    rows = np.concatenate([batch.rows for batch in batches]).tolist()
    places = np.concatenate([batch.text_index for batch in batches]).tolist()
    counts = [len(texts.questions) for texts in split.texts(range(split.num_samples))]
    assert list(zip(rows, places, strict=True)) == [
        (row, i) for row, count in enumerate(counts) for i in range(count)
    ]
    examples = [example for batch in batches for example in fingerprints(batch)]
    assert [example[1] for example in examples] == list(range(sum(counts)))
    whole = eval_batches(split, "questions", 1000)
    assert examples == [example for batch in whole for example in fingerprints(batch)]


def test_the_next_window_of_shards_is_fetched_while_one_is_read(
    object_store: str, tmp_path: Path
) -> None:
    make_dataset(object_store, num_samples=23, samples_per_shard=2)
    split = Dataset.open(object_store, cache=tmp_path).split("train", EXTRACTOR)
    batches = make_loader(split, 2).batches(0, 100, 0, 1, 2)
    next(batches)
    deadline = time.monotonic() + 20
    while len(cached(tmp_path)) < 2 * 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    batches.close()
    # Two windows of two shards, each with its sidecar; a third if the readers were quick.
    assert 2 * 4 <= len(cached(tmp_path)) <= 3 * 4


def cached(folder: Path) -> list[Path]:
    return list(folder.rglob("*.tar"))


def test_a_lost_shard_of_an_object_store_is_raised_at_its_step(
    object_store: str, tmp_path: Path
) -> None:
    dataset = make_dataset(object_store, num_samples=12, samples_per_shard=2)
    split = Dataset.open(object_store, cache=tmp_path).split("train", EXTRACTOR)
    storage.remove(f"{object_store}/features/{EXTRACTOR}/{list(dataset.shards)[2]}.tar")
    batches = make_loader(split, 2, distractors=False).batches(0, 100, 0, 1, 2)
    with pytest.raises(ShardError, match=list(dataset.shards)[2]):
        list(batches)


AUGMENTED = LiveConfig(
    images=ImageConfig(size=12, augment=AugmentConfig()), grid=(2, 3), patches=False
)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """21 photographs with 31 captions in four shards."""
    written = TinyDataset(str(tmp_path_factory.mktemp("photographs")), image=jpeg)
    for start in range(0, 21, 6):
        written.add_shard("train", range(start, min(start + 6, 21)))
    return Dataset.open(written.url).split("train", AUGMENTED)


def pictures(
    split: Split,
    start: int,
    stop: int,
    world_size: int,
    micro: int,
    threads: int = 2,
    seed: int = 4,
) -> list[tuple[bytes, ...]]:
    """Each example of each step as all ranks together see it: its key and its pixels."""
    order = Order(split, "captions", seed=SEED, window_shards=2)
    loader = Loader(split, order, global_batch_size=12, seed=seed, threads=threads)
    ranks = [loader.batches(start, stop, rank, world_size, micro) for rank in range(world_size)]
    return [
        (batch.keys[i].encode(), batch.features.values[i].tobytes())
        for shares in zip(*ranks, strict=True)
        for share in shares
        for batch in share
        if batch.features is not None
        for i in range(len(batch.keys))
    ]


def test_augmented_pictures_are_the_same_for_any_ranks_threads_and_start(
    photographs: Split,
) -> None:
    whole = pictures(photographs, 0, 6, world_size=1, micro=12, threads=1)
    assert len(whole) == 6 * 12
    assert pictures(photographs, 0, 6, world_size=3, micro=2, threads=3) == whole
    assert pictures(photographs, 2, 6, world_size=2, micro=3) == whole[2 * 12 :]
    assert len({picture[1] for picture in whole}) == len(whole)  # no two crops are alike
    assert pictures(photographs, 0, 6, world_size=1, micro=12, seed=5) != whole


def test_pictures_are_varied_by_all_that_was_written_about_them(photographs: Split) -> None:
    order = Order(photographs, "captions", seed=SEED)
    ((batch,),) = Loader(photographs, order, global_batch_size=9, seed=1).batches(0, 1, 0, 1, 9)
    numbers = [int(key.removeprefix("sample-")) for key in batch.keys]
    assert batch.texts == [make_texts(number) for number in numbers]
    assert any(texts.questions for texts in batch.texts)


def test_an_evaluation_of_a_live_split_sees_whole_pictures(photographs: Split) -> None:
    whole = Dataset.open(photographs.url).split("train", AUGMENTED.whole())
    for batch in eval_batches(whole, "captions", 5):
        assert batch.features is not None
        for row, values in zip(batch.rows.tolist(), batch.features.values, strict=True):
            expected = live_features(whole.image(row), AUGMENTED)
            np.testing.assert_array_equal(values, expected.values[0])


def test_shards_of_images_are_fetched_where_pictures_are_read(
    object_store: str, tmp_path: Path
) -> None:
    written = TinyDataset(object_store, image=jpeg)
    written.add_shard("train", range(1, 6))
    split = Dataset.open(object_store, cache=tmp_path).split("train", AUGMENTED)
    order = Order(split, "captions", SEED)
    loader = Loader(split, order, global_batch_size=4, seed=SEED)
    ((batch,),) = loader.batches(0, 1, 0, 1, 4)
    assert batch.features is not None
    assert batch.features.values.shape == (4, 2 * 3, 12 * 12 * 3 // (2 * 3))
    assert len(cached(tmp_path)) == 1


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 4), (2, 3), (3, 2)])
def test_grouping_by_length_changes_only_which_micro_batch_an_example_is_in(
    split: Split, world_size: int, micro_batch_size: int
) -> None:
    order = Order(split, "questions", seed=SEED, window_shards=2)

    def make(kind: TextKind | None) -> Loader:
        return Loader(
            split, order, global_batch_size=24, seed=SEED, distractors=True, group_by=kind
        )

    def by_position(examples: list[tuple[object, ...]]) -> list[tuple[object, ...]]:
        return sorted(examples, key=lambda example: example[:2])

    per_rank = 24 // world_size
    for rank in range(world_size):
        how = (2, 5, rank, world_size, micro_batch_size)
        for plain, grouped in zip(
            make(None).batches(*how), make("questions").batches(*how), strict=True
        ):
            assert len(plain) == len(grouped) == per_rank // micro_batch_size
            assert by_position([e for batch in grouped for e in fingerprints(batch)]) == [
                e for batch in plain for e in fingerprints(batch)
            ]


def test_grouped_micro_batches_need_less_padding(tmp_path: Path) -> None:
    written = TinyDataset(str(tmp_path))
    written.add_shard("train", [*range(1, 10), *range(1001, 1010)])  # of one and of four digits
    split = Dataset.open(str(tmp_path)).split("train")
    order = Order(split, "captions", seed=SEED)
    widths = {}
    kinds: tuple[TextKind | None, ...] = (None, "captions")
    for kind in kinds:
        loader = Loader(split, order, global_batch_size=24, seed=SEED, group_by=kind)
        lengths = [
            [len(texts.captions[i]) for texts, i in zip(batch.texts, batch.text_index, strict=True)]
            for step in loader.batches(0, 4, 0, 1, 4)
            for batch in step
        ]
        widths[kind] = sum(4 * max(each) - sum(each) for each in lengths)
    assert widths["captions"] < widths[None] / 2
