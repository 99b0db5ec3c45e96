"""The query engine of the manifest."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.manifest.engine import Engine, Rows, Scan
from pipeline.errors import ManifestError

# Of every commit the keys that it has a row of.
histories = st.lists(st.sets(st.integers(0, 12), min_size=1), min_size=1, max_size=6)


def table_of(history: Sequence[set[int]], shards: int = 1) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"key": f"k{key}", "shard": f"s{key % shards}", "value": key * 100 + i, "sequence": i}
            for i, keys in enumerate(history)
            for key in sorted(keys)
        ],
        pa.schema(
            [
                ("key", pa.string()),
                ("shard", pa.string()),
                ("value", pa.int64()),
                ("sequence", pa.int64()),
            ]
        ),
    )


def newest(engine: Engine, rows: pa.Table, identity: Sequence[str]) -> list[dict[str, Any]]:
    def scan(columns: Sequence[str]) -> Rows:
        return Scan(lambda: rows.select(list(columns)))

    engine.register_newest("newest", scan, identity, ["key", "value"])
    found: list[dict[str, Any]] = engine.table("FROM newest ORDER BY key").to_pylist()
    return found


@settings(deadline=None, max_examples=25)
@given(histories)
def test_the_newest_row_of_every_key_is_found(history: list[set[int]]) -> None:
    with Engine() as engine:
        found = newest(engine, table_of(history), ["key"])
    last = {key: i for i, keys in enumerate(history) for key in sorted(keys)}
    expected = {f"k{key}": key * 100 + i for key, i in last.items()}
    assert {row["key"]: row["value"] for row in found} == expected
    assert len(found) == len(expected)


@settings(deadline=None, max_examples=10)
@given(histories)
def test_keys_whose_hashes_collide_are_told_apart(history: list[set[int]]) -> None:
    with Engine() as engine:
        engine.run("CREATE MACRO hash(key) AS 7")
        assert engine.value("SELECT hash('a') + hash('b')") == 14
        found = newest(engine, table_of(history), ["key"])
    assert {row["key"] for row in found} == {f"k{key}" for keys in history for key in keys}
    last = {key: i for i, keys in enumerate(history) for key in sorted(keys)}
    assert {row["value"] for row in found} == {key * 100 + i for key, i in last.items()}


def test_an_identity_may_be_of_several_columns() -> None:
    rows = pa.table(
        {
            "key": ["a", "a", "a", "b"],
            "shard": ["1", "2", "1", "1"],
            "value": [10, 20, 30, 40],
            "sequence": [1, 1, 2, 1],
        }
    )
    with Engine() as engine:
        found = newest(engine, rows, ["key", "shard"])
    assert sorted((row["key"], row["value"]) for row in found) == [("a", 20), ("a", 30), ("b", 40)]


def test_a_sort_larger_than_memory_is_spilled_and_cleared_away() -> None:
    numbers = np.random.default_rng(0).integers(0, 1 << 62, 1_000_000)
    rows = pa.table(
        {"number": numbers, "more": numbers, "much": numbers, "text": map(str, numbers)}
    )
    with Engine(memory_bytes=48 << 20) as engine:
        engine.register("rows", rows)
        found = [
            batch["number"].to_numpy() for batch in engine.batches("FROM rows ORDER BY number")
        ]
        spilled = Path(engine._spilled.name)
        assert any(spilled.iterdir())
    assert not spilled.exists()
    assert np.concatenate(found).tolist() == np.sort(numbers).tolist()


def test_a_view_can_be_read_again_and_again() -> None:
    reads = []

    def read() -> pa.Table:
        reads.append(1)
        return pa.table({"number": [1, 2, 3]})

    with Engine() as engine:
        engine.register("rows", Scan(read))
        engine.run("CREATE TEMP VIEW odd AS FROM rows WHERE number % 2 = 1")
        for _ in range(2):
            assert engine.value("SELECT sum(number) FROM odd") == 4
    assert len(reads) > 1


def test_a_source_that_fails_is_an_error_of_the_manifest() -> None:
    def broken() -> pa.RecordBatchReader:
        def batches() -> object:
            yield pa.record_batch({"number": pa.array([1])})
            raise OSError("part-0.parquet is gone")

        return pa.RecordBatchReader.from_batches(pa.schema([("number", pa.int64())]), batches())

    with Engine() as engine:
        engine.register("rows", Scan(broken))
        with pytest.raises(ManifestError, match=r"part-0\.parquet is gone"):
            engine.table("FROM rows ORDER BY number")
        with pytest.raises(ManifestError, match="cannot be queried"):
            list(engine.batches("FROM nowhere"))


def test_python_variables_are_not_tables() -> None:
    here = pa.table({"number": [1]})
    with Engine() as engine, pytest.raises(ManifestError, match="here"):
        engine.table("FROM here")
    assert here.num_rows == 1
