import io
import json
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from pipeline.data.ingest.ingest import IngestConfig, ingest
from pipeline.data.load.order import Order
from pipeline.data.manifest.engine import Engine
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.retention import Retention
from pipeline.data.manifest.schema import (
    FeaturePart,
    FeatureRow,
    SampleRow,
    State,
    from_table,
    part_suffix,
    to_table,
)
from pipeline.data.read.dataset import Dataset
from pipeline.data.sample import Sample
from pipeline.data.sources.webdataset import WebDatasetSourceConfig
from pipeline.data.tars.shard import ShardWriter
from pipeline.data.upkeep.compact import compact
from pipeline.data.upkeep.verify import verify
from pipeline.reason import Reason
from tests.data.album import encoded, picture
from tests.data.tiny_dataset import npy
from tests.data.world import Item, World, check_dataset, disturb, make_world

CONFIG = IngestConfig(
    samples_per_shard=4, max_reject_fraction=0.9, max_removed_fraction=1.0, shards_in_flight=0
)
EXTRACTOR = "regions-0123abcd"

SAMPLES = pa.schema(
    [
        *((name, pa.string()) for name in ("key", "split", "state", "reason", "detail")),
        *((name, pa.string()) for name in ("fingerprint", "digest", "shard", "tar", "suffix")),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("texts_shard", pa.string()),
        ("texts_offset", pa.int64()),
        ("texts_size", pa.int64()),
        *((f"num_{kind}", pa.int32()) for kind in ("captions", "questions", "rounds")),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("source_digest", pa.string()),
        ("perceptual_hash", pa.int64()),
        ("duplicate_of", pa.string()),
        ("sequence", pa.int64()),
    ]
)
FEATURES = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        *((name, pa.int64()) for name in ("values_offset", "values_size")),
        *((name, pa.int64()) for name in ("boxes_offset", "boxes_size")),
        ("num_regions", pa.int32()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("sequence", pa.int64()),
    ]
)


def earlier_sample(row: SampleRow) -> dict[str, Any]:
    fingerprint = f"{row.image_fingerprint}-{row.texts_fingerprint}"
    if row.state == State.REJECT and not row.suffix:
        fingerprint = f"{row.reason}:{fingerprint}"
    tar = None
    if row.tar is not None:
        counted = f"{row.tar.listing}-{row.tar.num_records}"
        tar = f"{row.tar.stamp}#{counted}#{row.tar.location}"
    known: dict[str, Any] = msgspec.to_builtins(row)
    return known | {"fingerprint": fingerprint, "tar": tar, "reason": row.reason or ""}


def earlier_feature(row: FeatureRow) -> dict[str, Any]:
    place: dict[str, Any] = {
        "values_offset": -1,
        "values_size": 0,
        "boxes_offset": -1,
        "boxes_size": 0,
    }
    for part in row.parts:
        if part.name in ("values", "boxes"):
            place |= {f"{part.name}_offset": part.offset, f"{part.name}_size": part.size}
    known: dict[str, Any] = msgspec.to_builtins(row)
    return known | place | {"num_regions": max(row.num_regions, 0)}


def write_earlier(url: str, table: str, schema: pa.Schema, rows: list[dict[str, Any]]) -> None:
    """Puts a table of the earlier form in place of one, with the same versions."""
    location = f"{url}/manifest/{table}"
    shutil.rmtree(location, ignore_errors=True)
    DeltaTable.create(location, schema)
    for version in range(1, max(row["sequence"] for row in rows) + 1):
        part = [row for row in rows if row["sequence"] == version]
        write_deltalake(location, pa.Table.from_pylist(part, schema), mode="append")


def make_earlier(url: str) -> None:
    """Brings a dataset, whose versions only add rows, to the earlier form."""
    manifest = Manifest.open(url)
    columns = list(SampleRow.__struct_fields__)
    rows = from_table(manifest.rows_after(-1, columns), SampleRow)
    write_earlier(url, "samples", SAMPLES, [earlier_sample(row) for row in rows])
    for extractor in manifest.extractors():
        listed = from_table(manifest.features(extractor).rows(), FeatureRow)
        earlier = [earlier_feature(row) for row in listed]
        write_earlier(url, f"features/{extractor}", FEATURES, earlier)


def rows(manifest: Manifest) -> list[SampleRow]:
    return sorted(from_table(manifest.rows(), SampleRow), key=lambda row: row.key)


def trained_in_order(url: str) -> list[str]:
    split = Dataset.open(url).split("train")
    order = Order(split, "captions", seed=3)
    return split.keys(order.between(0, order.num_examples).rows)


def small_world() -> World:
    world = make_world(14, seed=3)
    world.items |= {"gone": Item(5, "x", fault="missing-image"), "good": Item(6, "y")}
    return world


def test_an_earlier_manifest_is_read_at_every_version_and_followed_by_ingest(
    tmp_path: Path,
) -> None:
    url, world = str(tmp_path), small_world()
    ingest(world, url, CONFIG)
    world.items["good"] = replace(world.items["good"], caption="another")
    del world.items["key-3"]
    version = ingest(world, url, CONFIG).version
    versions = [rows(Manifest.open(url, number)) for number in range(version + 1)]
    content = Dataset.open(url).content()
    keys = trained_in_order(url)
    make_earlier(url)

    assert [rows(Manifest.open(url, number)) for number in range(version + 1)] == versions
    assert Dataset.open(url).content() == content
    assert trained_in_order(url) == keys
    assert verify(url).faults == ()
    columns = list(SampleRow.__struct_fields__)
    with Engine() as engine:
        Manifest.open(url).register(engine, "held", columns)
        held = from_table(engine.table("FROM held ORDER BY key"), SampleRow)
        assert list(held) == versions[-1]
    world.reads.clear()
    again = ingest(world, url, CONFIG)
    assert (again.num_added, again.num_edited, again.num_removed) == (0, 0, 0)
    assert (again.version, world.reads) == (version, [])

    world.items["gone"] = Item(5, "x")
    world.items["good"] = replace(world.items["good"], touched=1)
    after = ingest(world, url, CONFIG)
    assert (after.num_added, after.num_edited) == (0, 2)
    assert after.version >= version + 2  # one of them has the same rows in the present form
    check_dataset(url, world)
    assert [rows(Manifest.open(url, number)) for number in range(version + 1)] == versions
    since = Manifest.open(url).rows_after(version, ["key"])["key"].to_pylist()
    assert sorted(since) == ["gone", "good"]
    assert [v.version for v in Manifest.open(url).versions() if v.replaced] == [version + 1]


@pytest.mark.parametrize("seed", range(2))
def test_an_earlier_manifest_follows_a_world_that_changes(tmp_path: Path, seed: int) -> None:
    url, world, random = str(tmp_path), make_world(20, seed), Random(seed)
    ingest(world, url, CONFIG)
    make_earlier(url)
    for _ in range(3):
        for _ in range(6):
            disturb(world, random)
        ingest(world, url, CONFIG)
        check_dataset(url, world)


def test_an_earlier_dataset_is_compacted(tmp_path: Path) -> None:
    url, world = str(tmp_path), World({f"key-{n}": Item(n, f"caption {n}") for n in range(9)})
    ingest(world, url, CONFIG)
    for n in range(7):
        del world.items[f"key-{n}"]
    ingest(world, url, CONFIG)
    make_earlier(url)
    content = Dataset.open(url).content()
    compact(url, Retention(min_age_hours=0, last_versions=1))
    assert Dataset.open(url).content() == content
    assert verify(url).faults == ()


def test_two_writers_on_an_earlier_manifest_keep_what_each_has(tmp_path: Path) -> None:
    url = str(tmp_path)
    ingest(World({"old": Item(1, "x")}), url, CONFIG)
    make_earlier(url)

    def commit(key: str) -> None:
        row = SampleRow(
            key=key,
            split="train",
            state=State.LIVE,
            suffix="jpg",
            image_fingerprint="1",
            texts_fingerprint="2",
        )
        Manifest.open(url).commit(to_table([row], SampleRow))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(commit, ["a", "b", "c"]))
    assert sorted(Manifest.open(url).samples(["key"])["key"].to_pylist()) == ["a", "b", "c", "old"]


def test_an_earlier_manifest_without_rows_is_written_to(tmp_path: Path) -> None:
    url = str(tmp_path)
    DeltaTable.create(f"{url}/manifest/samples", SAMPLES)
    assert Manifest.create(url).rows().num_rows == 0
    assert ingest(World({"a": Item(1, "x")}), url, CONFIG).num_live == 1
    assert [row.key for row in rows(Manifest.open(url))] == ["a"]


def test_tars_of_an_earlier_manifest_stay_unopened(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for number in range(3):
                words = b"" if (name, number) == ("two", 1) else f"words {number}".encode()
                for part, payload in (("png", encoded(picture(number))), ("txt", words)):
                    info = tarfile.TarInfo(f"{name}-{number}.{part}")
                    info.size = len(payload)
                    tar.addfile(info, io.BytesIO(payload))
    shards = [str(tmp_path / f"{name}.tar") for name in ("one", "two")]
    config = WebDatasetSourceConfig(type="webdataset", shards=shards)
    url = str(tmp_path / "dataset")
    version = ingest(config.build(), url, CONFIG).version
    before = rows(Manifest.open(url))
    assert {row.tar.num_records for row in before if row.tar} == {3}
    make_earlier(url)

    assert rows(Manifest.open(url)) == before
    report = ingest(config.build(), url, CONFIG)
    assert (report.num_unchanged, report.version) == (6, version)
    split = Dataset.open(url).split("train")
    assert len(split.image(0)) > 0
    assert verify(url).faults == ()


def write_sidecar(url: str, shard: str, keys: list[str]) -> list[FeatureRow]:
    """Writes features as a detector has them: int8 with scales, boxes, classes and outlines."""
    listed = []
    with ShardWriter(f"{url}/features/{EXTRACTOR}", shard) as writer:
        for number, key in enumerate(keys, start=1):
            payloads = {
                "values": npy(np.full((number, 8), number, np.int8)),
                "scales": npy(np.full((number, 1), 0.5, np.float32)),
                "boxes": npy(np.full((number, 4), 0.25, np.float32)),
                "classes": npy(np.full((number, 5), 0.2, np.float16)),
                "segments": json.dumps([{"size": [1, 1], "counts": "0" * number}]).encode(),
            }
            parts = {part_suffix(name): payload for name, payload in payloads.items()}
            members = writer.write(Sample(key, parts))
            places = [FeaturePart(name, *members[part_suffix(name)]) for name in payloads]
            listed.append(FeatureRow(key=key, shard=shard, num_regions=number, parts=tuple(places)))
    why = Reason.TRUNCATED_IMAGE
    return [*listed, FeatureRow(key="reject", shard=shard, reason=why, detail="9 bytes")]


def by_key(listed: list[FeatureRow]) -> dict[str, tuple[int, set[FeaturePart], str | None]]:
    return {row.key: (row.num_regions, set(row.parts), row.reason) for row in listed}


def test_every_part_of_earlier_features_is_found(tmp_path: Path) -> None:
    url = str(tmp_path)
    features = Manifest.create(url).features(EXTRACTOR)
    wanted = write_sidecar(url, "s1", ["a", "b", "c"])
    features.commit(to_table(wanted, FeatureRow))
    layout = {"scales": ("float32", ["R", 1]), "classes": ("float16", ["R", 5])}
    parts = {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in layout.items()}
    card = {"parts": parts, "segments": "COCO run-length codes"}
    (tmp_path / "features" / EXTRACTOR / "card.json").write_text(json.dumps(card))
    earlier = [earlier_feature(row) | {"sequence": 1} for row in wanted]
    write_earlier(url, f"features/{EXTRACTOR}", FEATURES, earlier)

    found = by_key(list(from_table(features.rows(), FeatureRow)))
    expected = by_key(wanted)
    assert {key: found[key][1:] for key in found} == {key: expected[key][1:] for key in expected}

    more = write_sidecar(url, "s2", ["d"])
    assert features.commit(to_table(more, FeatureRow)) == 3
    found = by_key(list(from_table(features.rows(), FeatureRow)))
    assert {key: found[key][1] for key in "abcd"} == {
        key: by_key([*wanted, *more])[key][1] for key in "abcd"
    }


def test_a_list_made_before_there_were_rejects_is_read_and_added_to(tmp_path: Path) -> None:
    manifest = Manifest.create(str(tmp_path))
    features = manifest.features("grid-1")
    names = [name for name in FEATURES.names if name not in ("reason", "detail")]
    first = pa.schema([FEATURES.field(name) for name in names])
    parts = (FeaturePart("values", 512, 640),)
    listed = [FeatureRow(key=key, shard="s1", num_regions=9, parts=parts) for key in "ab"]
    earlier = [earlier_feature(row) | {"sequence": 1} for row in listed]
    write_earlier(str(tmp_path), "features/grid-1", first, earlier)
    assert features.rejects().num_rows == 0
    assert features.rows(["key", "reason"])["reason"].null_count == 2
    assert {row.parts for row in from_table(features.rows(), FeatureRow)} == {parts}

    reject = {"key": "c", "shard": "s2", "reason": "truncated-image", "detail": "9 bytes"}
    features.commit(to_table([msgspec.convert(reject, FeatureRow)], FeatureRow))
    assert features.rejects().to_pylist() == [reject]
    assert features.rows().num_rows == 3
    features.shrink({"s2"}, datetime.now(UTC) + timedelta(days=1))
    assert features.rows(["key"])["key"].to_pylist() == ["c"]
