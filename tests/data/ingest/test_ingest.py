import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import webdataset
import xxhash
from PIL import Image

from pipeline import storage
from pipeline.data.ingest.filters import FilterConfig
from pipeline.data.ingest.image_policy import ImagePolicy
from pipeline.data.ingest.ingest import IngestConfig, IngestReport, ingest, write_shard
from pipeline.data.ingest.ingest_plan import plan_ingest
from pipeline.data.manifest import pending_commits
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.media.reencode import ReencodeConfig
from pipeline.data.sources import columns as columns_module
from pipeline.data.sources.base import Record, Reject
from pipeline.data.sources.folder import FolderSource, FolderSourceConfig
from pipeline.data.sources.merged import MergedSourceConfig
from pipeline.data.tars.shard import shard_location
from pipeline.data.upkeep.verify import verify
from pipeline.errors import (
    ManifestError,
    RejectError,
    RemovalError,
    ShardError,
    SourceError,
    StorageError,
)
from tests.data.album import Album, encoded, picture
from tests.data.sources.built import draw
from tests.data.world import Item, Killed, World, check_dataset, disturb, make_world


def config(samples_per_shard: int = 4, max_reject_fraction: float = 0.9) -> IngestConfig:
    return IngestConfig(
        samples_per_shard=samples_per_shard,
        max_reject_fraction=max_reject_fraction,
        shards_in_flight=0,
    )


def good_world(num_items: int) -> World:
    return World({f"key-{n}": Item(n, f"caption {n}") for n in range(num_items)})


def shard_names(url: str) -> list[str]:
    return [
        f"{split}/{name}"
        for split in storage.list_names(f"{url}/shards")
        for name in storage.list_names(f"{url}/shards/{split}")
    ]


@pytest.mark.parametrize("seed", range(4))
def test_after_any_edits_every_record_is_one_sample_or_one_reject(
    tmp_path: Path, seed: int
) -> None:
    random = Random(seed)
    url = str(tmp_path)
    world = make_world(23, seed)
    for _ in range(8):
        ingest(world, url, config(samples_per_shard=random.randint(1, 9)))
        check_dataset(url, world)
        for _ in range(random.randint(0, 6)):
            disturb(world, random)


def test_an_unchanged_run_opens_no_image_and_writes_nothing(tmp_path: Path) -> None:
    world = make_world(30)
    first = ingest(world, str(tmp_path), config())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    world.reads.clear()

    again = ingest(world, str(tmp_path), config())

    assert world.reads == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert (again.version, again.num_unchanged, again.num_shards) == (first.version, 30, 0)
    assert again.rejects == first.rejects


def test_only_added_and_edited_images_are_read(tmp_path: Path) -> None:
    world = good_world(20)
    ingest(world, str(tmp_path), config())
    world.reads.clear()
    world.items["key-20"] = Item(20, "new")
    world.items["key-3"] = Item(333, "caption 3")
    del world.items["key-4"]

    report = ingest(world, str(tmp_path), config())

    assert sorted(world.reads) == ["key-20", "key-3"]
    assert (report.num_added, report.num_edited, report.num_removed) == (1, 1, 1)
    assert report.num_shards == 1
    assert report.num_live == 20
    check_dataset(str(tmp_path), world)


def test_an_edited_caption_leaves_the_image_where_it_is_and_unread(tmp_path: Path) -> None:
    world = good_world(6)
    ingest(world, str(tmp_path), config())
    before = {row["key"]: row for row in Manifest.open(str(tmp_path)).samples().to_pylist()}
    world.reads.clear()
    world.items["key-2"] = replace(world.items["key-2"], caption="other words")

    ingest(world, str(tmp_path), config())

    after = {row["key"]: row for row in Manifest.open(str(tmp_path)).samples().to_pylist()}
    assert world.reads == []
    assert after["key-2"]["shard"] == before["key-2"]["shard"]
    assert after["key-2"]["texts_shard"] != before["key-2"]["texts_shard"]
    check_dataset(str(tmp_path), world)


def test_a_touched_file_is_read_but_not_stored_again(tmp_path: Path) -> None:
    world = good_world(6)
    ingest(world, str(tmp_path), config())
    shards = shard_names(str(tmp_path))
    world.items["key-2"] = replace(world.items["key-2"], touched=1)
    world.reads.clear()

    report = ingest(world, str(tmp_path), config())

    assert world.reads == ["key-2"]
    assert report.num_shards == 0
    assert shard_names(str(tmp_path)) == shards
    assert ingest(world, str(tmp_path), config()).num_unchanged == 6


def test_a_reject_is_tried_again_only_when_its_fingerprint_changes(tmp_path: Path) -> None:
    world = good_world(6)
    world.items["key-1"] = Item(1, "one", fault="truncated-image")
    assert ingest(world, str(tmp_path), config()).rejects == {"truncated-image": 1}
    world.reads.clear()
    ingest(world, str(tmp_path), config())
    assert world.reads == []
    world.items["key-1"] = Item(1, "one")
    assert ingest(world, str(tmp_path), config()).num_live == 6


def test_the_same_records_make_the_same_shards_in_any_listing_order(tmp_path: Path) -> None:
    world = make_world(17)
    reversed_world = World(dict(reversed(world.items.items())))
    ingest(world, str(tmp_path / "one"), config())
    ingest(reversed_world, str(tmp_path / "other"), config())
    assert shard_names(str(tmp_path / "one")) == shard_names(str(tmp_path / "other"))


def test_old_versions_stay_as_they_were(tmp_path: Path) -> None:
    world = good_world(5)
    version = ingest(world, str(tmp_path), config()).version
    before = Manifest.open(str(tmp_path)).samples().to_pylist()
    world.items["key-0"] = Item(99, "edited")
    del world.items["key-1"]
    ingest(world, str(tmp_path), config())
    assert Manifest.open(str(tmp_path), version).samples().to_pylist() == before


def test_plain_webdataset_reads_the_shards(tmp_path: Path) -> None:
    world = good_world(9)
    ingest(world, str(tmp_path), config())
    shards = sorted(str(path) for path in tmp_path.rglob("shards/train/*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert {sample["__key__"] for sample in samples} == set(world.items)
    assert all(sample["jpg"].size == (7, 5) for sample in samples)
    assert {sample["json"]["captions"][0] for sample in samples} == {
        item.caption for item in world.items.values()
    }


def test_the_second_record_of_a_key_is_a_reject_and_stays_one(tmp_path: Path) -> None:
    class Doubled(World):
        def records(self) -> Iterator[Record | Reject]:
            yield from super().records()
            yield from super().records()

    world = Doubled(good_world(3).items)
    report = ingest(world, str(tmp_path), config())
    assert (report.num_live, report.rejects) == (3, {"duplicate-id": 3})
    rejects = Manifest.open(str(tmp_path)).rejects(["key"])["key"].to_pylist()
    assert sorted(rejects) == [f"key-{n}-duplicate-2" for n in range(3)]
    assert ingest(world, str(tmp_path), config()).num_unchanged == 6


def test_copies_are_told_apart_however_the_listing_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = Random(4)
    names = ["a", "a-duplicate-2", "b", "c", "d", "e-duplicate-2", "e"]
    listing = [random.choice(names) for _ in range(40)]

    class Listing(World):
        def records(self) -> Iterator[Record | Reject]:
            records = {entry.key: entry for entry in super().records()}
            yield from (records[name] for name in listing)

    world = Listing({name: Item(n, name) for n, name in enumerate(names)})
    for chunk in (1, 3, 7, 100):
        url = str(tmp_path / str(chunk))
        monkeypatch.setattr(columns_module, "_ROWS_AT_ONCE", chunk)
        report = ingest(world, url, config())
        keys = Manifest.open(url).rows(["key"])["key"].to_pylist()
        assert len(keys) == len(set(keys)) == report.num_listed == len(listing)
        assert report.num_live >= len(set(listing)) - 2  # a copy may have taken a name first
        assert ingest(world, url, config()).num_unchanged == len(listing)


def test_too_many_rejects_stop_the_run_before_the_manifest_changes(tmp_path: Path) -> None:
    world = good_world(10)
    version = ingest(world, str(tmp_path), config()).version
    for n in range(4):
        world.items[f"key-{n}"] = Item(n, "x", fault="missing-image")
    with pytest.raises(RejectError, match=r"4 of 10(.|\n)*missing-image: 4, for example key-0"):
        ingest(world, str(tmp_path), config(max_reject_fraction=0.3))
    assert Manifest.open(str(tmp_path)).version == version


def test_too_many_bad_images_stop_the_run_early(tmp_path: Path) -> None:
    world = World({f"key-{n}": Item(n, "x", fault="not-an-image") for n in range(50)})
    world.items["key-50"] = Item(1, "good")
    with pytest.raises(RejectError, match="not-an-image"):
        ingest(world, str(tmp_path), config(max_reject_fraction=0.1))
    assert len(world.reads) == 8


def test_a_dataset_without_any_sample_is_refused(tmp_path: Path) -> None:
    world = World({"a": Item(1, "x", fault="missing-image")})
    with pytest.raises(RejectError, match="all of them"):
        ingest(world, str(tmp_path), config(max_reject_fraction=1.0))


def test_an_empty_listing_removes_nothing(tmp_path: Path) -> None:
    ingest(good_world(3), str(tmp_path), config())
    with pytest.raises(SourceError, match="no record"):
        ingest(World({}), str(tmp_path), config())
    assert Manifest.open(str(tmp_path)).samples().num_rows == 3


def without(world: World, *keys: str) -> World:
    return World({key: item for key, item in world.items.items() if key not in keys})


def test_a_listing_that_lacks_half_of_the_samples_is_refused_before_anything_changes(
    tmp_path: Path,
) -> None:
    url = str(tmp_path)
    world = good_world(8)
    before = ingest(world, url, config()).version
    half = without(world, *(f"key-{n}" for n in range(4)))
    half.items["key-new"] = Item(99, "a new one")
    half.items["key-7"] = Item(98, "an edited one")

    with pytest.raises(
        RemovalError, match=r"4 of 8 samples would be removed.*key-[0-3]"
    ) as refusal:
        ingest(half, url, config())

    assert "4 are not in the source any more" in str(refusal.value)
    assert "--allow-removals" in str(refusal.value)
    assert Manifest.open(url).version == before
    check_dataset(url, world)
    allowed = config().model_copy(update={"max_removed_fraction": 0.5})
    report = ingest(half, url, allowed)
    assert (report.num_added, report.num_edited, report.num_removed) == (1, 1, 4)
    assert report.num_unchanged == 3
    check_dataset(url, half)


@pytest.mark.parametrize("num_live", [1, 2, 3, 5, 9])
def test_a_single_sample_may_always_go_unless_none_may(tmp_path: Path, num_live: int) -> None:
    url = str(tmp_path)
    world = good_world(num_live + 1)
    ingest(world, url, config())
    none = config().model_copy(update={"max_removed_fraction": 0.0})
    with pytest.raises(RemovalError, match=f"1 of {num_live + 1} samples"):
        ingest(without(world, "key-0"), url, none)
    assert ingest(without(world, "key-0"), url, config()).num_removed == 1
    check_dataset(url, without(world, "key-0"))


def test_samples_whose_images_are_gone_count_as_removed(tmp_path: Path) -> None:
    url = str(tmp_path)
    world = good_world(6)
    world.items["key-0"] = Item(0, "a reject already", fault="missing-image")
    ingest(world, url, config())
    unmounted = World(
        {key: replace(item, fault="missing-image") for key, item in world.items.items()}
    )
    unmounted.items["key-5"] = world.items["key-5"]
    with pytest.raises(RemovalError, match=r"4 of 5 samples.*4 are rejected as missing-image"):
        ingest(unmounted, url, config())
    check_dataset(url, world)


def test_rejects_may_go_and_come_in_any_number(tmp_path: Path) -> None:
    world = good_world(3)
    world.items |= {f"bad-{n}": Item(n, "gone", fault="missing-image") for n in range(20)}
    ingest(world, str(tmp_path), config())
    assert ingest(good_world(3), str(tmp_path), config()).num_removed == 20
    ingest(world, str(tmp_path), config())
    check_dataset(str(tmp_path), world)


def test_what_a_filter_newly_leaves_out_is_no_removal(tmp_path: Path) -> None:
    world = good_world(4)
    ingest(world, str(tmp_path), config())
    world.items["key-0"] = Item(0, "the only one of many words")
    wordy = config().model_copy(update={"filters": FilterConfig(min_caption_words=4)})
    report = ingest(world, str(tmp_path), wordy)
    assert (report.num_live, report.rejects) == (1, {"caption-length": 3})


def test_a_full_disk_leaves_a_valid_dataset_and_the_next_run_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(20)
    writes = iter(range(100))

    def fill_up(_: Path) -> None:
        if next(writes) >= 2:
            raise StorageError("no space left on device")

    monkeypatch.setattr(pending_commits, "COMMIT_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_flush", fill_up)
        with pytest.raises(StorageError, match="no space"):
            ingest(world, str(tmp_path), config())
    check_dataset(str(tmp_path), world, complete=False)
    assert 0 < Manifest.open(str(tmp_path)).samples().num_rows < 20
    ingest(world, str(tmp_path), config())
    check_dataset(str(tmp_path), world)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_breaks_anywhere_is_finished_by_the_next(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending_commits, "COMMIT_SECONDS", 0.0)
    random = Random(seed)
    world = make_world(25, seed)
    for _ in range(6):
        world.reads.clear()
        world.fail_at_read = random.randrange(25)
        with contextlib.suppress(Killed):
            ingest(world, str(tmp_path), config(samples_per_shard=random.randint(1, 5)))
        check_dataset(str(tmp_path), world, complete=False)
        for _ in range(random.randint(0, 4)):
            disturb(world, random)
    world.fail_at_read = -1
    ingest(world, str(tmp_path), config())
    check_dataset(str(tmp_path), world)


def test_what_was_listed_before_a_break_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending_commits, "COMMIT_SECONDS", 0.0)
    world = good_world(20)
    world.fail_at_read = 13
    with pytest.raises(Killed):
        ingest(world, str(tmp_path), config(samples_per_shard=4))
    world.fail_at_read = -1
    world.reads.clear()
    ingest(world, str(tmp_path), config(samples_per_shard=4))
    assert len(world.reads) == 20 - 12
    check_dataset(str(tmp_path), world)


def kill_at_random_moments(url: str, num_kills: int, seed: int) -> None:
    """Starts an ingest again and again, kill -9 at a random moment, then lets one finish."""
    random = Random(seed)
    num_items = 150
    command = [sys.executable, "-m", "tests.data.world", url, str(num_items), str(seed)]
    root = Path(__file__).resolve().parents[3]
    world = make_world(num_items, seed)
    for _ in range(num_kills):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(random.uniform(0.0, 0.5))
            process.kill()
        if Manifest.exists(url):
            check_dataset(url, world, complete=False)
    subprocess.run(command, check=True, cwd=root, stdout=subprocess.DEVNULL)
    check_dataset(url, world)


@pytest.mark.processes
def test_kills_at_random_moments_lose_and_double_nothing(tmp_path: Path) -> None:
    kill_at_random_moments(str(tmp_path), num_kills=5, seed=1)


@pytest.mark.processes
@pytest.mark.slow
def test_many_kills_at_random_moments_lose_and_double_nothing(tmp_path: Path) -> None:
    for seed in range(6):
        kill_at_random_moments(str(tmp_path / str(seed)), num_kills=8, seed=seed)


@pytest.mark.processes
def test_kills_lose_and_double_nothing_on_an_object_store(object_store: str) -> None:
    kill_at_random_moments(object_store, num_kills=3, seed=2)


def test_edits_reach_an_object_store(object_store: str) -> None:
    random = Random(5)
    world = make_world(15, 5)
    for _ in range(3):
        ingest(world, object_store, config())
        check_dataset(object_store, world)
        for _ in range(4):
            disturb(world, random)


def test_overlapping_runs_leave_one_valid_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending_commits, "COMMIT_SECONDS", 0.0)
    worlds = [make_world(40, seed=3) for _ in range(3)]

    def run(world: World) -> IngestReport:
        world.seconds_per_read = 0.001
        return ingest(world, str(tmp_path), config(samples_per_shard=5))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, worlds))
    check_dataset(str(tmp_path), worlds[0])
    assert run(worlds[0]).num_unchanged == 40


def test_overlapping_runs_of_different_listings_agree_after_one_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending_commits, "COMMIT_SECONDS", 0.0)
    random = Random(7)
    worlds = [make_world(30, seed=4), make_world(30, seed=4)]
    ingest(worlds[0], str(tmp_path), config())
    for world in worlds:
        for _ in range(15):
            disturb(world, random)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda world: ingest(world, str(tmp_path), config(3)), worlds))
    ingest(worlds[1], str(tmp_path), config())
    check_dataset(str(tmp_path), worlds[1])


_INGEST_FOLDER = """
import sys
from pipeline.data.manifest import pending_commits
from pipeline.data.ingest.ingest import IngestConfig, ingest
from pipeline.data.sources.folder import FolderSourceConfig
from pipeline.errors import PipelineError

pending_commits.COMMIT_SECONDS = 0.0  # as if each shard took a second to write
folder, url = sys.argv[1:]
source = FolderSourceConfig(type="folder", folder=folder).build()
print("ready", flush=True)
sys.stdin.readline()
try:
    report = ingest(source, url, IngestConfig(samples_per_shard=1, shards_in_flight=0))
except PipelineError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def ingest_two_sources_at_once(folder: Path, url: str) -> None:
    """Asserts that of two sources in two processes one makes the dataset, the other is refused."""
    for source in ("a", "b"):
        (folder / source).mkdir()
        for n in range(25):
            (folder / source / f"{source}-{n}.jpg").write_bytes(Item(n, "").image())
            (folder / source / f"{source}-{n}.txt").write_text(f"{source} {n}")
    root = Path(__file__).resolve().parents[3]
    processes = {
        source: subprocess.Popen(
            [sys.executable, "-c", _INGEST_FOLDER, str(folder / source), url],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=root,
        )
        for source in ("a", "b")
    }  # fmt: skip
    for process in processes.values():
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = {source: process.communicate()[1] for source, process in processes.items()}
    (winner,) = (source for source, process in processes.items() if process.returncode == 0)
    (refused,) = (text for source, text in said.items() if source != winner)
    assert refused.startswith(("ManifestError: ", "RemovalError: ")), refused
    keys = Manifest.open(url).samples(["key"])["key"].to_pylist()
    assert sorted(keys) == sorted(f"{winner}-{n}" for n in range(25))
    assert Manifest.open(url).rows(["key"]).num_rows == 25


@pytest.mark.processes
def test_of_two_sources_ingested_at_once_one_is_refused(tmp_path: Path) -> None:
    ingest_two_sources_at_once(tmp_path, str(tmp_path / "data"))


@pytest.mark.processes
def test_of_two_sources_ingested_at_once_one_is_refused_on_an_object_store(
    tmp_path: Path, object_store: str
) -> None:
    ingest_two_sources_at_once(tmp_path, object_store)


def test_a_run_stops_once_another_source_has_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending_commits, "COMMIT_SECONDS", 0.0)
    url = str(tmp_path / "data")
    sources = {}
    for name in ("a", "b"):
        draw(*(tmp_path / name / f"{name}{n}.png" for n in range(6)))
        for n in range(6):
            (tmp_path / name / f"{name}{n}.txt").write_text(name)
        sources[name] = FolderSourceConfig(type="folder", folder=str(tmp_path / name))
    both = MergedSourceConfig(type="merged", sources=[*sources.values()])

    class Interrupted(FolderSource):
        num_read = 0

        def read(self, record: Record) -> bytes:
            self.num_read += 1
            if self.num_read == 4:
                ingest(both.build(), url, config(2))
            return super().read(record)

    with pytest.raises(ManifestError, match=r"version \d+, of 2.*by another ingest"):
        ingest(Interrupted(sources["a"]), url, config(1))
    assert Manifest.open(url).samples().num_rows == 12
    assert ingest(both.build(), url, config(2)).num_unchanged == 12


def test_an_overlapping_run_does_not_list_again_what_another_has(tmp_path: Path) -> None:
    world = good_world(12)
    late = plan_ingest(world, Manifest.create(str(tmp_path)))
    report = ingest(world, str(tmp_path), config(samples_per_shard=4))

    manifest = late.manifest.commit(late.settled)
    for shard_plan in late.shards(samples_per_shard=3, policy=ImagePolicy()):
        manifest = manifest.commit(write_shard(shard_plan, world).rows)

    assert Manifest.open(str(tmp_path)).version == report.version
    check_dataset(str(tmp_path), world)


def test_an_older_listing_does_not_remove_what_a_newer_one_added(tmp_path: Path) -> None:
    world = good_world(4)
    ingest(world, str(tmp_path), config())
    older = World({key: item for key, item in world.items.items() if key != "key-0"})
    plan = plan_ingest(older, Manifest.open(str(tmp_path)))
    world.items["key-0"] = Item(77, "edited meanwhile")
    ingest(world, str(tmp_path), config())

    plan.manifest.commit(plan.settled)

    check_dataset(str(tmp_path), world)


def test_writing_a_shard_again_gives_the_same_shard(tmp_path: Path) -> None:
    world = make_world(9)
    plan = plan_ingest(world, Manifest.create(str(tmp_path)))
    plans = list(plan.shards(samples_per_shard=50, policy=ImagePolicy()))
    first = [write_shard(shard_plan, world) for shard_plan in plans]
    again = [write_shard(shard_plan, world) for shard_plan in plans]
    assert [entry.shard for entry in first] == [entry.shard for entry in again]
    assert all(a.rows.equals(b.rows) for a, b in zip(first, again, strict=True))
    assert Manifest.open(str(tmp_path)).samples().num_rows == 0


@pytest.mark.usefixtures("ray_local")
def test_ray_tasks_write_what_one_process_writes(tmp_path: Path) -> None:
    world = make_world(21)
    done: list[tuple[int, int]] = []
    by_ray = config(samples_per_shard=3).model_copy(update={"shards_in_flight": 2})

    report = ingest(world, str(tmp_path / "ray"), by_ray, lambda *pair: done.append(pair))

    ingest(world, str(tmp_path / "one"), config(samples_per_shard=3))
    check_dataset(str(tmp_path / "ray"), world)
    assert shard_names(str(tmp_path / "ray")) == shard_names(str(tmp_path / "one"))
    assert done[0][0] == 0
    assert done[-1][0] == done[-1][1]
    assert report.num_listed == 21


@pytest.mark.usefixtures("ray_local")
def test_an_error_in_a_ray_task_is_the_error_itself(tmp_path: Path) -> None:
    class Faulty(World):
        def read(self, _: Record) -> bytes:
            raise StorageError("the network is down")

    by_ray = config().model_copy(update={"shards_in_flight": 2})
    with pytest.raises(StorageError, match=r"^the network is down$"):
        ingest(Faulty(good_world(5).items), str(tmp_path), by_ray)


@pytest.mark.usefixtures("ray_local")
def test_a_lost_ray_worker_is_replaced(tmp_path: Path) -> None:
    once = tmp_path / "killed-once"

    class Deadly(World):
        def read(self, record: Record) -> bytes:
            if record.key == "key-3" and not once.exists():
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return self.items[record.key].image()

    world = Deadly(good_world(8).items)
    ingest(world, str(tmp_path / "data"), config(2).model_copy(update={"shards_in_flight": 2}))
    assert once.exists()
    check_dataset(str(tmp_path / "data"), world)


@pytest.mark.usefixtures("ray_local")
def test_a_record_that_kills_every_worker_is_named(tmp_path: Path) -> None:
    class Deadly(World):
        def read(self, record: Record) -> bytes:
            if record.key == "key-3":
                os.kill(os.getpid(), signal.SIGKILL)
            return self.items[record.key].image()

    world = Deadly(good_world(7).items)
    by_ray = config(7).model_copy(update={"shards_in_flight": 1})
    with pytest.raises(ShardError, match=r"a worker died 4 times.*record 'key-3'"):
        ingest(world, str(tmp_path / "data"), by_ray)


def images(url: str) -> dict[str, Image.Image]:
    """The stored images, by key, as any reader of the shards finds them."""
    found: dict[str, Image.Image] = {}
    for row in Manifest.open(url).samples().to_pylist():
        location = shard_location(url, row["split"], row["shard"])
        payload = storage.read_range(location, row["image_offset"], row["image_size"])
        assert xxhash.xxh3_128_hexdigest(payload) == row["digest"]
        found[row["key"]] = Image.open(io.BytesIO(payload))
        assert found[row["key"]].size == (row["width"], row["height"])
    return found


def test_images_are_encoded_anew_if_asked(tmp_path: Path) -> None:
    url = str(tmp_path)
    album = Album({f"key-{n}": encoded(picture(n, 60, 40)) for n in range(5)})
    small = config().model_copy(update={"reencode": ReencodeConfig(shorter_side=20)})

    ingest(album, url, small)

    assert {image.format for image in images(url).values()} == {"JPEG"}
    assert {image.size for image in images(url).values()} == {(30, 20)}
    rows = Manifest.open(url).samples().to_pylist()
    assert {row["suffix"] for row in rows} == {"jpg"}
    sources = {row["key"]: row["source_digest"] for row in rows}
    assert sources == {k: xxhash.xxh3_128_hexdigest(p) for k, p in album.files.items()}
    assert not verify(url).faults
    album.reads.clear()
    assert ingest(album, url, small).num_unchanged == 5
    assert album.reads == []


def test_a_caption_is_edited_without_encoding_its_image_again(tmp_path: Path) -> None:
    album = Album({f"key-{n}": encoded(picture(n, 60, 40)) for n in range(5)})
    small = config().model_copy(update={"reencode": ReencodeConfig(shorter_side=20)})
    ingest(album, str(tmp_path), small)
    before = Manifest.open(str(tmp_path)).samples(["key", "digest", "source_digest", "shard"])
    album.captions["key-2"] = ("other words",)
    album.reads.clear()
    ingest(album, str(tmp_path), small)
    after = Manifest.open(str(tmp_path)).samples(["key", "digest", "source_digest", "shard"])
    assert album.reads == []
    assert after.sort_by("key") == before.sort_by("key")


def test_other_settings_store_anew_what_comes_out_differently_and_nothing_else(
    tmp_path: Path,
) -> None:
    url = str(tmp_path)
    sizes = {f"key-{n}": (20 + 10 * n, 20 + 10 * n) for n in range(6)}
    album = Album({k: encoded(picture(1, *size)) for k, size in sizes.items()})
    for key, side in {"first": 40, "second": 50}.items():
        settings = config().model_copy(update={"reencode": ReencodeConfig(shorter_side=side)})
        report = ingest(album, url, settings)
        rows = {row["key"]: row["shard"] for row in Manifest.open(url).samples().to_pylist()}
        if key == "first":
            before = rows
    assert report.num_edited == 6
    # Those of 20, 30 and 40 pixels are the same under both settings.
    assert {key for key in sizes if rows[key] != before[key]} == {"key-3", "key-4", "key-5"}
    assert images(url)["key-5"].size == (50, 50)

    ingest(album, url, config())
    assert {image.format for image in images(url).values()} == {"PNG"}
    assert {row["suffix"] for row in Manifest.open(url).samples().to_pylist()} == {"png"}


def test_filters_count_what_they_leave_out_and_stop_no_run(tmp_path: Path) -> None:
    url = str(tmp_path)
    files = {"good": (60, 40), "small": (20, 15), "wide": (200, 40), "silent": (60, 40)}
    album = Album({key: encoded(picture(1, *size)) for key, size in files.items()})
    album.captions = {key: ("one" if key == "silent" else "a few words",) for key in files}
    filters = FilterConfig(min_shorter_side=30, max_aspect_ratio=2.5, min_caption_words=2)
    filtered = IngestConfig(shards_in_flight=0, max_reject_fraction=0.0, filters=filters)

    report = ingest(album, url, filtered)

    assert report.rejects == {"too-small": 1, "extreme-aspect": 1, "caption-length": 1}
    assert ingest(album, url, filtered).num_unchanged == 4
    (row,) = Manifest.open(url).samples(["key", "shard"]).to_pylist()
    assert row["key"] == "good"

    assert ingest(album, url, IngestConfig(shards_in_flight=0)).num_live == 4
    assert row in Manifest.open(url).samples(["key", "shard"]).to_pylist()  # not stored again


def test_faults_stop_a_run_however_much_was_filtered(tmp_path: Path) -> None:
    album = Album({f"key-{n}": encoded(picture(n, 20, 15 + n)) for n in range(10)})
    album.files["key-1"] = b"<html>"
    filters = FilterConfig(min_shorter_side=18)
    strict = IngestConfig(shards_in_flight=0, max_reject_fraction=0.05, filters=filters)
    with pytest.raises(RejectError, match="1 of them for faults"):
        ingest(album, str(tmp_path), strict)


def test_by_content_a_touched_file_is_unchanged_and_a_hidden_edit_is_found(
    tmp_path: Path,
) -> None:
    album = Album({f"key-{n}": encoded(picture(n)) for n in range(5)})
    album.metadata = dict.fromkeys(album.files, "10 bytes at noon")
    by_content = config().model_copy(update={"fingerprint": "content"})
    first = ingest(album, str(tmp_path), by_content)
    album.metadata["key-1"] = "10 bytes at one"
    assert ingest(album, str(tmp_path), by_content).version == first.version
    album.files["key-2"] = encoded(picture(77))
    report = ingest(album, str(tmp_path), by_content)
    assert (report.num_edited, report.num_shards) == (1, 1)
    assert np.array_equal(np.asarray(images(str(tmp_path))["key-2"]), np.asarray(picture(77)))
