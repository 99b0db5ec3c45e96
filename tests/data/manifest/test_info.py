from pathlib import Path

from pipeline.data.ingest.ingest import IngestConfig, ingest
from pipeline.data.manifest.info import describe, rejects
from tests.data.tiny_dataset import EXTRACTOR, make_dataset
from tests.data.world import FAULTS, Item, World

CONFIG = IngestConfig(samples_per_shard=4, max_reject_fraction=0.9, shards_in_flight=0)


def test_what_a_dataset_holds_is_counted(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), num_samples=10)
    found = describe(str(tmp_path))
    assert found["splits"]["train"]["samples"] == 10
    assert found["splits"]["train"]["shards"] == 3
    assert found["splits"]["val"]["captions"] == 101 % 4 + 102 % 4 + 103 % 4
    assert found["features"] == {EXTRACTOR: 10}
    assert found["rejects"] == {}


def test_rejects_are_a_table_by_reason(tmp_path: Path) -> None:
    world = World({f"bad-{fault}": Item(1, "x", fault=fault) for fault in FAULTS})
    world.items |= {"good": Item(2, "y"), "a-bad-one": Item(3, "z", fault=FAULTS[0])}
    version = ingest(world, str(tmp_path), CONFIG).version
    found = rejects(str(tmp_path)).to_pylist()
    assert [row["reason"] for row in found] == sorted([*FAULTS, FAULTS[0]])
    assert all(row["detail"] for row in found)
    one = rejects(str(tmp_path), version, FAULTS[0])
    assert one["key"].to_pylist() == ["a-bad-one", f"bad-{FAULTS[0]}"]
    assert rejects(str(tmp_path), 0).num_rows == 0
