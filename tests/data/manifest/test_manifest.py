from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from pipeline.data.manifest.engine import Engine
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import (
    SAMPLES,
    SampleRow,
    State,
    to_table,
)
from pipeline.errors import ManifestError


def rows(state: str = "live", **fingerprints: str) -> pa.Table:
    return to_table(
        [
            SampleRow(
                key=key,
                split="train",
                state=State(state),
                suffix="jpg",
                image_fingerprint=fingerprint,
                texts_fingerprint="texts",
            )
            for key, fingerprint in fingerprints.items()
        ],
        SampleRow,
    )


def held(manifest: Manifest) -> dict[str, str]:
    table = manifest.samples(["key", "image_fingerprint"]).to_pydict()
    return dict(zip(table["key"], table["image_fingerprint"], strict=True))


def test_the_newest_row_of_a_key_holds(tmp_path: Path) -> None:
    manifest = Manifest.create(str(tmp_path))
    manifest = manifest.commit(rows(a="1", b="1", c="1"))
    manifest = manifest.commit(rows(a="2"))
    manifest = manifest.commit(rows("removed", b="1"))
    manifest = manifest.commit(rows("reject", d="1"))
    assert held(manifest) == {"a": "2", "c": "1"}
    assert manifest.rejects(["key"])["key"].to_pylist() == ["d"]
    assert manifest.rows().num_rows == 4
    assert held(Manifest.open(str(tmp_path))) == held(manifest)
    sequences = manifest.rows(["key", "sequence"]).to_pylist()
    assert {row["key"]: row["sequence"] for row in sequences} == {"a": 2, "b": 3, "c": 1, "d": 4}


def test_an_engine_reads_the_rows_that_hold(tmp_path: Path) -> None:
    manifest = Manifest.create(str(tmp_path))
    for fingerprints in ({"a": "1", "b": "1"}, {"a": "2"}, {"c": "1"}):
        manifest = manifest.commit(rows(**fingerprints))
    columns = ["image_fingerprint", "key", "sequence"]
    with Engine() as engine:
        for version in range(4):
            manifest = Manifest.open(str(tmp_path), version)
            manifest.register(engine, f"version {version}", columns)
            found = engine.table(f'FROM "version {version}" ORDER BY key')
            assert found == manifest.rows(columns).sort_by("key")
        manifest.features("none").register(engine, "features", ["key", "shard"])
        assert engine.table("FROM features").num_rows == 0


def test_every_version_stays_readable(tmp_path: Path) -> None:
    manifest = Manifest.create(str(tmp_path))
    for number in range(5):
        manifest = manifest.commit(rows(a=str(number)))
    assert [held(Manifest.open(str(tmp_path), version))["a"] for version in range(1, 6)] == [
        *"01234"
    ]
    assert [entry.version for entry in manifest.versions()] == [5, 4, 3, 2, 1, 0]
    assert held(Manifest.open(str(tmp_path), 0)) == {}


def test_nothing_is_committed_without_rows(tmp_path: Path) -> None:
    manifest = Manifest.create(str(tmp_path))
    assert manifest.commit(SAMPLES.empty_table()).version == 0
    assert Manifest.create(str(tmp_path)).version == 0


def test_a_commit_on_an_old_version_keeps_what_others_committed(tmp_path: Path) -> None:
    mine = Manifest.create(str(tmp_path))
    Manifest.create(str(tmp_path)).commit(rows(a="theirs", b="same"))
    after = mine.commit(rows(b="same", c="mine"))
    assert after.version == 2
    assert held(after) == {"a": "theirs", "b": "same", "c": "mine"}
    by_key = {row["key"]: row["sequence"] for row in after.rows(["key", "sequence"]).to_pylist()}
    assert by_key == {"a": 1, "b": 1, "c": 2}


def test_a_chain_of_commits_remembers_what_others_did(tmp_path: Path) -> None:
    mine = Manifest.create(str(tmp_path))
    Manifest.create(str(tmp_path)).commit(rows(a="same", b="same"))
    mine = mine.commit(rows(c="mine"))  # finds out about the others
    mine = mine.commit(rows(a="same"))
    mine = mine.commit(rows("removed", b="old"))
    assert mine.version == 2
    assert held(mine) == {"a": "same", "b": "same", "c": "mine"}


def test_a_good_sample_is_not_superseded_by_a_reject_of_the_same_record(tmp_path: Path) -> None:
    mine = Manifest.create(str(tmp_path))
    Manifest.create(str(tmp_path)).commit(rows(a="1"))
    assert held(mine.commit(rows("reject", a="1"))) == {"a": "1"}
    mine = Manifest.open(str(tmp_path))
    Manifest.open(str(tmp_path)).commit(rows("reject", b="1"))
    assert held(mine.commit(rows(b="1"))) == {"a": "1", "b": "1"}


def commit_at_once(url: str, num_writers: int, num_commits: int) -> None:
    def work(writer: int) -> None:
        manifest = Manifest.create(url)
        for number in range(num_commits):
            manifest = manifest.commit(rows(**{f"key-{writer}-{number}": "1", "shared": "1"}))

    with ThreadPoolExecutor(num_writers) as pool:
        list(pool.map(work, range(num_writers)))
    manifest = Manifest.open(url)
    assert manifest.version == num_writers * num_commits
    assert manifest.samples().num_rows == num_writers * num_commits + 1
    sequences = manifest.rows(["sequence"])["sequence"].to_pylist()
    assert set(sequences) == set(range(1, num_writers * num_commits + 1))


def test_of_writers_at_once_each_makes_its_own_version(tmp_path: Path) -> None:
    commit_at_once(str(tmp_path), num_writers=4, num_commits=5)


def test_of_writers_at_once_each_makes_its_own_version_on_an_object_store(
    object_store: str,
) -> None:
    commit_at_once(object_store, num_writers=3, num_commits=3)


def test_a_dataset_without_a_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no manifest here"):
        Manifest.open(str(tmp_path / "absent"))
    assert not Manifest.exists(str(tmp_path / "absent"))
    assert list(tmp_path.iterdir()) == []


def test_an_absent_version_is_named(tmp_path: Path) -> None:
    Manifest.create(str(tmp_path))
    with pytest.raises(ManifestError, match=r"there is no version 7; the newest is \d"):
        Manifest.open(str(tmp_path), 7)


def test_a_lost_file_of_the_manifest_is_named(tmp_path: Path) -> None:
    manifest = Manifest.create(str(tmp_path)).commit(rows(a="1"))
    next(tmp_path.rglob("*.parquet")).unlink()
    with pytest.raises(ManifestError, match="version 1 cannot be read"):
        manifest.samples()


def test_another_table_is_not_taken_for_a_manifest(tmp_path: Path) -> None:

    write_deltalake(str(tmp_path / "manifest" / "samples"), pa.table({"x": [1]}))
    with pytest.raises(ManifestError, match="columns"):
        Manifest.open(str(tmp_path))


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    manifest = Manifest.create(str(tmp_path))
    with pytest.raises(ManifestError, match="do not fit"):
        manifest.commit(pa.table({"key": ["a"]}))
    with pytest.raises(ManifestError, match="only 1 different key"):
        manifest.commit(pa.concat_tables([rows(a="1"), rows(a="2")]))
