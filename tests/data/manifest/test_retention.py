import json
from pathlib import Path

import pytest

from pipeline.data.ingest.ingest import IngestConfig, ingest
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.retention import Retention, needed_by, versions_of_run
from pipeline.data.manifest.versions import Kept
from pipeline.errors import ManifestError, StorageError
from tests.data.world import Item, World

CONFIG = IngestConfig(samples_per_shard=4, max_reject_fraction=0.9, shards_in_flight=0)


def grown(url: str, num_versions: int) -> Manifest:
    world = World({"key-0": Item(0, "zero")})
    for n in range(1, num_versions + 1):
        world.items["key-0"] = Item(n, f"picture {n}")
        ingest(world, url, CONFIG)
    return Manifest.open(url)


def test_named_and_newest_versions_are_kept(tmp_path: Path) -> None:
    manifest = grown(str(tmp_path), 6)
    assert manifest.version == 6
    kept = Retention(2, frozenset({1, 3, 5}), min_age_hours=0).kept(manifest)
    assert kept == Kept(5, frozenset({1, 3}))
    assert [version in kept for version in range(7)] == [
        False, True, False, True, False, True, True,
    ]  # fmt: skip
    assert str(kept) == "1, 3, all from 5 on"


def test_all_versions_of_the_last_hours_are_kept_and_the_one_before_them(tmp_path: Path) -> None:
    manifest = grown(str(tmp_path), 3)
    assert Retention(1, min_age_hours=1).kept(manifest).first == 0


def test_the_shards_of_the_kept_versions_are_needed_and_no_others(tmp_path: Path) -> None:
    manifest = grown(str(tmp_path), 6)
    shard = {
        v: Manifest.open(str(tmp_path), v).samples(["shard"])["shard"][0].as_py()
        for v in range(1, 7)
    }
    needed = needed_by(manifest, Kept(5, frozenset({2})))
    assert needed.shards == {("train", shard[v]) for v in (2, 5, 6)}


def test_rows_that_were_replaced_are_still_found(tmp_path: Path) -> None:
    manifest = grown(str(tmp_path), 4)
    shards = needed_by(manifest, Kept(2)).shards
    smaller = manifest.shrink()
    assert smaller.version == manifest.version + 1
    assert smaller.samples().num_rows == 1
    assert needed_by(smaller, Kept(2)).shards == shards
    assert needed_by(smaller, Kept(5)).shards < shards


def test_a_run_says_which_versions_it_read(tmp_path: Path) -> None:
    dataset = str(tmp_path / "dataset")
    (tmp_path / "environment.json").write_text(json.dumps({"versions": {dataset: [5, 7]}}))
    assert versions_of_run(str(tmp_path), dataset) == {5, 7}
    with pytest.raises(ManifestError, match=r"nothing of .*other; it has read .*dataset"):
        versions_of_run(str(tmp_path), str(tmp_path / "other"))
    with pytest.raises(StorageError, match="no such file"):
        versions_of_run(str(tmp_path / "absent"), dataset)
    for damaged in ("{", "[1]"):
        (tmp_path / "environment.json").write_text(damaged)
        with pytest.raises(ManifestError, match="not a JSON object"):
            versions_of_run(str(tmp_path), dataset)
