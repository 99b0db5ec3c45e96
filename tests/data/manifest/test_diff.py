from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from pipeline.data.ingest.ingest import IngestConfig, ingest
from pipeline.data.manifest.diff import diff
from pipeline.data.manifest.retention import Retention
from pipeline.data.upkeep.compact import compact
from pipeline.errors import ManifestError
from tests.data.world import Item, World, disturb, make_world

CONFIG = IngestConfig(
    samples_per_shard=4, max_reject_fraction=0.9, max_removed_fraction=1.0, shards_in_flight=0
)


def test_each_kind_of_change_is_told(tmp_path: Path) -> None:
    url = str(tmp_path)
    faulty = Item(9, "nine", fault="not-an-image")
    world = World({f"key-{n}": Item(n, f"caption {n}") for n in range(8)})
    world.items |= {"key-8": faulty, "key-9": faulty}
    before = ingest(world, url, CONFIG).version
    items = world.items
    del items["key-0"], items["key-8"]
    items["key-1"] = replace(items["key-1"], picture=101)
    items["key-2"] = replace(items["key-2"], caption="other")
    items["key-3"] = replace(items["key-3"], caption="other", picture=103)
    items["key-4"] = replace(items["key-4"], split="validation", caption="other")
    items["key-5"] = replace(items["key-5"], fault="not-an-image")
    items["key-6"] = replace(items["key-6"], touched=1)
    items["key-9"] = replace(items["key-9"], fault="")
    items["new"] = Item(77, "new")
    items["new-reject"] = faulty
    after = ingest(world, url, CONFIG).version

    found = diff(url, before, after)

    changes = {row["key"]: (row["change"], row["was"]) for row in found.rows.to_pylist()}
    assert changes == {
        "key-0": ("removed", None),
        "key-1": ("image", None),
        "key-2": ("texts", None),
        "key-3": ("image and texts", None),
        "key-4": ("split", "train"),
        "key-5": ("rejected", None),
        "key-8": ("cleared", "not-an-image"),
        "key-9": ("added", "not-an-image"),
        "new": ("added", None),
        "new-reject": ("rejected", None),
    }
    assert (found.num_before, found.num_after) == (8, 8)
    assert found.counts()["added"] == 2
    assert list(found.counts()) == [
        "added", "removed", "image", "texts", "image and texts", "split", "rejected", "cleared",
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_added_and_removed_account_for_the_number_of_samples(tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    world = make_world(20, seed)
    versions = [ingest(world, str(tmp_path), CONFIG).version]
    for _ in range(3):
        for _ in range(8):
            disturb(world, random)
        versions.append(ingest(world, str(tmp_path), CONFIG).version)
    forth = diff(str(tmp_path), versions[0], versions[-1])
    back = diff(str(tmp_path), versions[-1], versions[0])
    assert diff(str(tmp_path), versions[0], versions[0]).rows.num_rows == 0
    assert (forth.num_before, forth.num_after) == (back.num_after, back.num_before)
    gains, losses = forth.counts().get("added", 0), back.counts().get("added", 0)
    assert forth.num_after - forth.num_before == gains - losses


def test_where_a_sample_lies_is_no_change(tmp_path: Path) -> None:
    url = str(tmp_path)
    world = World({f"key-{n}": Item(n, f"caption {n}") for n in range(9)})
    ingest(world, url, CONFIG)
    for n in range(7):
        del world.items[f"key-{n}"]
    before = ingest(world, url, CONFIG).version
    after = compact(url, Retention(min_age_hours=1)).version
    assert after > before
    assert diff(url, before, after).rows.num_rows == 0


def test_an_absent_version_is_named(tmp_path: Path) -> None:
    ingest(make_world(5), str(tmp_path), CONFIG)
    with pytest.raises(ManifestError, match="version 99"):
        diff(str(tmp_path), 0, 99)
