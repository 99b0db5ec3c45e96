import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from pipeline import storage
from pipeline.data.ingest.image_policy import ImagePolicy
from pipeline.data.ingest.ingest import IngestConfig, ingest
from pipeline.data.ingest.ingest_plan import plan_ingest
from pipeline.data.manifest import pending_commits
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.retention import Retention
from pipeline.data.manifest.schema import FeaturePart, FeatureRow, to_table
from pipeline.data.read.dataset import Dataset
from pipeline.data.sample import Sample
from pipeline.data.tars.shard import ShardWriter
from pipeline.data.upkeep import compact as compact_module
from pipeline.data.upkeep.compact import CompactReport, compact
from pipeline.data.upkeep.verify import verify
from pipeline.errors import ManifestError, ShardError
from tests.data.cards import card_bytes
from tests.data.tiny_dataset import EXTRACTOR, npy
from tests.data.world import Item, World, check_dataset, disturb, make_world

NOW = Retention(last_versions=1, min_age_hours=0)  # nothing old is kept


CARD = card_bytes(grid=[2, 3], parts={"scores": {"dtype": "float16", "shape": ["R"]}})


def config(samples_per_shard: int = 4) -> IngestConfig:
    return IngestConfig(
        samples_per_shard=samples_per_shard,
        max_reject_fraction=0.9,
        max_removed_fraction=1.0,
        shards_in_flight=0,
    )


def good_world(num_items: int) -> World:
    return World({f"key-{n}": Item(n, f"caption {n}") for n in range(num_items)})


def values_of(key: str) -> np.ndarray:
    return np.random.default_rng(abs(hash(key)) % 2**32).random((6, 8)).astype(np.float16)


def extract(url: str, extractor: str = EXTRACTOR, missing: tuple[str, ...] = ()) -> None:
    """Gives the samples features, shard by shard, but for those that are `missing`."""
    manifest = Manifest.open(url)
    storage.write_bytes(f"{url}/features/{extractor}/card.json", CARD)
    listed = manifest.features(extractor).shards()
    shards: dict[str, list[str]] = {}
    for row in manifest.samples(["key", "shard"]).to_pylist():
        shards.setdefault(row["shard"], []).append(row["key"])
    for shard, keys in shards.items():
        if shard in listed or set(keys) & set(missing):
            continue
        rows = []
        with ShardWriter(f"{url}/features/{extractor}", shard) as writer:
            for key in keys:
                # As a detector does, with a part beside the values.
                payloads = {"npy": npy(values_of(key)), "scores.npy": npy(values_of(key)[:, 0])}
                members = writer.write(Sample(key, payloads))
                parts = (
                    FeaturePart("values", *members["npy"]),
                    FeaturePart("scores", *members["scores.npy"]),
                )
                rows.append(FeatureRow(key=key, shard=shard, num_regions=6, parts=parts))
        manifest.features(extractor).commit(to_table(rows, FeatureRow))


def files(url: str) -> set[str]:
    return {str(path.relative_to(url)) for path in Path(url).rglob("*") if path.is_file()}


def tars(url: str, folder: str = "shards") -> list[str]:
    return sorted(file for file in files(url) if file.startswith(folder) and ".tar" in file)


def check_features(url: str, version: int | None = None) -> None:
    dataset = Dataset.open(url, version)
    for name in dataset.splits():
        split = dataset.split(name, EXTRACTOR)
        read = split.features(np.arange(split.num_samples))
        assert read.scores is not None
        for key, values, scores in zip([*split.each_key()], read.values, read.scores, strict=True):
            assert np.array_equal(values, values_of(key))
            assert np.array_equal(scores, values_of(key)[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_after_any_edits_nothing_is_lost_and_the_features_stay(tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    url = str(tmp_path)
    world = make_world(23, seed)
    for _ in range(6):
        ingest(world, url, config(samples_per_shard=random.randint(2, 9)))
        extract(url)
        compact(url, Retention(random.randint(1, 9), min_age_hours=0))
        check_dataset(url, world)
        check_features(url)
        found = verify(url)
        assert (found.faults, found.features[EXTRACTOR].num_missing) == ((), 0)
        world.reads.clear()
        ingest(world, url, config())
        assert world.reads == []
        for _ in range(random.randint(0, 12)):
            disturb(world, random)


def test_only_what_the_newest_version_lists_is_left_when_nothing_else_is_kept(
    tmp_path: Path,
) -> None:
    url = str(tmp_path)
    world = good_world(12)
    ingest(world, url, config())
    extract(url)
    for n in range(9):
        world.items[f"key-{n}"] = replace(world.items[f"key-{n}"], picture=100 + n)
    ingest(world, url, config())
    extract(url)

    report = compact(url, NOW)

    manifest = Manifest.open(url)
    used = manifest.samples(["split", "shard"]).to_pylist()
    assert tars(url) == sorted({f"shards/{row['split']}/{row['shard']}.tar" for row in used})
    assert {Path(name).name for name in tars(url, "features")} == {
        Path(name).name for name in tars(url)
    }
    assert sum(file.endswith(".parquet") and "_delta_log" not in file for file in files(url)) == 2
    assert report.num_removed > 0
    assert manifest.samples().num_rows == 12


def test_a_compaction_with_nothing_to_do_changes_nothing(tmp_path: Path) -> None:
    url = str(tmp_path)
    random = Random(1)
    world = make_world(30, seed=1)
    for _ in range(5):
        ingest(world, url, config())
        extract(url)
        for _ in range(9):
            disturb(world, random)
    compact(url, NOW)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    report = compact(url, NOW)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before
    assert (report.num_rewritten, report.num_removed) == (0, 0)


def test_small_shards_of_many_ingests_are_joined(tmp_path: Path) -> None:
    url = str(tmp_path)
    world = good_world(10)
    ingest(world, url, config(samples_per_shard=10))
    for n in range(10, 16):
        world.items[f"key-{n}"] = Item(n, "one more")
        ingest(world, url, config(samples_per_shard=10))
        extract(url)
    assert len(tars(url)) == 7
    report = compact(url, NOW)
    assert len(tars(url)) == len(tars(url, "features")) == 2
    assert (report.num_rewritten, report.num_shards) == (6, 1)
    check_dataset(url, world)
    check_features(url)


def test_worn_shards_are_joined_into_full_ones(tmp_path: Path) -> None:
    url = str(tmp_path)
    world = good_world(40)
    ingest(world, url, config(samples_per_shard=10))
    rows = Manifest.open(url).samples(["key", "shard"]).to_pylist()
    for shard in {row["shard"] for row in rows}:
        for row in [row for row in rows if row["shard"] == shard][:7]:
            del world.items[row["key"]]
    ingest(world, url, config(samples_per_shard=10))
    report = compact(url, NOW)
    assert (report.num_rewritten, report.num_shards) == (12, 2)  # of ten and of two
    check_dataset(url, world)


def test_texts_that_were_edited_again_and_again_are_joined_without_their_images(
    tmp_path: Path,
) -> None:
    url = str(tmp_path)
    world = good_world(8)
    ingest(world, url, config(samples_per_shard=8))
    images = {row["key"]: row["shard"] for row in Manifest.open(url).samples().to_pylist()}
    for n in range(3):
        world.items[f"key-{n}"] = replace(world.items[f"key-{n}"], caption=f"other {n}")
        ingest(world, url, config())
    assert len(tars(url)) == 4
    compact(url, NOW)
    rows = {row["key"]: row for row in Manifest.open(url).samples().to_pylist()}
    assert {key: row["shard"] for key, row in rows.items()} == images
    assert len(tars(url)) == 2
    check_dataset(url, world)


def test_a_shard_whose_features_are_incomplete_is_not_joined_with_complete_ones(
    tmp_path: Path,
) -> None:
    url = str(tmp_path)
    world = good_world(8)
    ingest(world, url, config(samples_per_shard=8))
    for n in range(8, 12):
        world.items[f"key-{n}"] = Item(n, "one more")
        ingest(world, url, config())
        extract(url, missing=("key-8", "key-9"))
    compact(url, NOW)
    assert len(tars(url)) == 3
    assert verify(url).features[EXTRACTOR].num_missing == 2
    extract(url)
    check_features(url)


def test_kept_versions_read_as_before_and_dropped_ones_are_refused(tmp_path: Path) -> None:
    url = str(tmp_path)
    random = Random(3)
    world = make_world(20, seed=3)
    worlds, versions = [], []
    for _ in range(6):
        versions.append(ingest(world, url, config()).version)
        worlds.append(World(dict(world.items)))
        extract(url)
        for _ in range(8):
            disturb(world, random)
    contents = {version: content(url, version) for version in versions}

    compact(url, Retention(1, frozenset({versions[1], versions[3]}), min_age_hours=0))

    for version in (versions[1], versions[3]):
        assert content(url, version) == contents[version]
        check_features(url, version)
    for version in (versions[0], versions[2], versions[4]):
        with pytest.raises(ManifestError, match=f"version {version} was dropped.*kept: "):
            Dataset.open(url, version)
    compact(url, Retention(1, frozenset(versions[:4]), min_age_hours=0))
    assert content(url, versions[3]) == contents[versions[3]]
    with pytest.raises(ManifestError, match="dropped"):
        Dataset.open(url, versions[0])
    check_dataset(url, worlds[-1])


def content(url: str, version: int) -> dict[str, tuple[bytes, tuple[str, ...]]]:
    dataset = Dataset.open(url, version)
    found = {}
    for name in dataset.splits():
        split = dataset.split(name)
        for row, key in enumerate([*split.each_key()]):
            found[key] = (split.image(row), split.texts([row])[0].captions)
    return found


def test_the_last_versions_stay(tmp_path: Path) -> None:
    url = str(tmp_path)
    world = good_world(3)
    for n in range(6):
        world.items["key-0"] = replace(world.items["key-0"], picture=50 + n)
        version = ingest(world, url, config()).version
    contents = {v: content(url, v) for v in (version - 1, version)}
    compact(url, Retention(last_versions=4, min_age_hours=0))  # ours are among the four
    for v, expected in contents.items():
        assert content(url, v) == expected


def test_what_is_young_stays(tmp_path: Path) -> None:
    """Its shards are unlisted because their ingest is still at work."""
    url = str(tmp_path)
    world = good_world(6)
    ingest(world, url, config())
    world.items["key-0"] = replace(world.items["key-0"], picture=99)
    ingest(world, url, config())
    with ShardWriter(f"{url}/shards/train") as writer:
        writer.write(Sample("unlisted", {"jpg": b"x"}))
    partial = tmp_path / "shards" / "train" / ".draft.01234567.partial"
    partial.write_bytes(b"half")
    before = tars(url)

    compact(url, Retention(last_versions=1, min_age_hours=1))
    assert set(tars(url)) >= set(before)

    two_hours_ago = time.time() - 7200
    for path in tmp_path.rglob("*"):
        os.utime(path, (two_hours_ago, two_hours_ago))
    # The versions are still young: what they list stays, what nobody lists goes.
    compact(url, Retention(last_versions=1, min_age_hours=1))
    assert set(before) - set(tars(url)) == {f"shards/train/{writer.shard.name}.tar"}
    assert not partial.exists()


def test_an_ingest_that_was_planned_before_keeps_its_images(tmp_path: Path) -> None:
    url = str(tmp_path)
    world = good_world(8)
    ingest(world, url, config())
    for n in range(6):
        world.items[f"key-{n}"] = replace(world.items[f"key-{n}"], picture=100 + n)
    ingest(world, url, config())
    world.items["key-7"] = replace(world.items["key-7"], caption="edited")
    plan = plan_ingest(world, Manifest.open(url))

    compact(url, Retention(last_versions=1, min_age_hours=1))

    from pipeline.data.ingest.ingest import write_shard

    manifest = plan.manifest
    for shard_plan in plan.shards(samples_per_shard=4, policy=ImagePolicy()):
        manifest = manifest.commit(write_shard(shard_plan, world).rows)
    check_dataset(url, world)
    assert verify(url).faults == ()


def test_an_edit_that_came_meanwhile_is_not_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path)
    world = good_world(8)
    ingest(world, url, config())
    for n in range(7):
        del world.items[f"key-{n}"]
    ingest(world, url, config())
    real = compact_module._list

    def slow(*arguments: object) -> Manifest:
        world.items["key-7"] = replace(world.items["key-7"], caption="edited meanwhile")
        ingest(world, url, config())
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(compact_module, "_list", slow)
    compact(url, Retention(last_versions=1, min_age_hours=1))
    check_dataset(url, world)


def test_a_damaged_image_stops_it_before_anything_is_removed(tmp_path: Path) -> None:
    url = str(tmp_path)
    world = good_world(4)
    ingest(world, url, config())
    for n in range(3):
        del world.items[f"key-{n}"]
    ingest(world, url, config())
    row = Manifest.open(url).samples().to_pylist()[0]
    with Path(f"{url}/shards/train/{row['shard']}.tar").open("r+b") as file:
        file.seek(row["image_offset"] + 9)
        file.write(b"rot")
    before = files(url)
    with pytest.raises(ShardError, match=r"key-3.*not the one that was stored"):
        compact(url, NOW)
    assert files(url) == before


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_break_at_any_write_or_removal_leaves_a_valid_dataset(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending_commits, "COMMIT_SECONDS", 0.0)
    random = Random(seed)
    world = make_world(16, seed)
    url = str(tmp_path)
    for _ in range(4):
        ingest(world, url, config())
        extract(url)
        for _ in range(10):
            disturb(world, random)
    ingest(world, url, config())
    extract(url)
    finished = False
    for stop in range(100):
        steps = iter(range(1000))

        def step(*_: object, stop: int = stop, steps: object = steps) -> None:
            if next(steps) == stop:  # type: ignore[call-overload]
                raise Killed

        with monkeypatch.context() as patch:
            for name in ("remove", "write_bytes", "_flush"):
                patch.setattr(storage, name, after(step, getattr(storage, name)))
            for name in ("write_deltalake",):
                import pipeline.data.manifest.table as table_module

                patch.setattr(table_module, name, after(step, getattr(table_module, name)))
            with contextlib.suppress(Killed):
                compact(url, NOW)
                finished = True
        check_dataset(url, world)
        check_features(url)
        if finished:
            break
    assert stop >= 3
    assert verify(url).faults == ()
    assert compact(url, NOW).num_rewritten == 0


def after(step: object, function: object) -> object:
    def stepped(*arguments: object, **named: object) -> object:
        step()  # type: ignore[operator]
        return function(*arguments, **named)  # type: ignore[operator]

    return stepped


@pytest.mark.processes
def test_kills_at_random_moments_leave_a_valid_dataset(tmp_path: Path) -> None:
    url = str(tmp_path)
    random = Random(8)
    world = make_world(60, 8)
    for _ in range(3):
        ingest(world, url, config(samples_per_shard=3))
        extract(url)
        for _ in range(25):
            disturb(world, random)
    ingest(world, url, config(samples_per_shard=3))
    extract(url)
    program = (
        "import sys; from pipeline.data.upkeep.compact import compact;"
        "from pipeline.data.manifest.retention import Retention; print('ready', flush=True);"
        "compact(sys.argv[1], Retention(1, min_age_hours=0))"
    )
    root = Path(__file__).resolve().parents[3]
    for _ in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", program, url], stdout=subprocess.PIPE, text=True, cwd=root
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(random.uniform(0.0, 0.25))
            process.send_signal(signal.SIGKILL)
        check_dataset(url, world)
        check_features(url)
    compact(url, NOW)
    assert verify(url).faults == ()


def test_ingests_and_compactions_at_once_leave_one_valid_dataset(tmp_path: Path) -> None:
    url = str(tmp_path)
    random = Random(2)
    world = make_world(30, 2)
    ingest(world, url, config(samples_per_shard=3))
    stop = threading.Event()
    reports: list[CompactReport] = []

    def compact_on() -> None:
        while not stop.is_set():
            reports.append(compact(url, Retention(last_versions=3, min_age_hours=1)))

    thread = threading.Thread(target=compact_on)
    thread.start()
    for _ in range(12):
        for _ in range(6):
            disturb(world, random)
        ingest(world, url, config(samples_per_shard=3))
    stop.set()
    thread.join()
    ingest(world, url, config(samples_per_shard=3))
    check_dataset(url, world)
    assert verify(url).faults == ()
    assert sum(report.num_rewritten for report in reports) > 0


def test_a_dataset_on_an_object_store_is_compacted(
    object_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path))
    world = good_world(9)
    ingest(world, object_store, config())
    for n in range(6):
        world.items[f"key-{n}"] = replace(world.items[f"key-{n}"], picture=100 + n)
    ingest(world, object_store, config())
    time.sleep(1.1)  # its clock shows whole seconds
    report = compact(object_store, NOW)
    assert report.num_removed > 0
    check_dataset(object_store, world)
    assert verify(object_store).faults == ()


def test_no_dataset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no manifest"):
        compact(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
