import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.tars.shard import shard_location, sidecar_location
from pipeline.data.upkeep import verify as verify_module
from pipeline.data.upkeep.verify import Verification, verify
from pipeline.errors import ManifestError
from tests.data.tiny_dataset import (
    EXTRACTOR,
    TinyDataset,
    grid_values,
    make_dataset,
    region_boxes,
    region_values,
)


def kinds(found: Verification) -> list[str]:
    return [fault.kind for fault in found.faults]


def rows(url: str) -> dict[str, dict]:
    return {row["key"]: row for row in Manifest.open(url).samples().to_pylist()}


def overwrite(path: str, offset: int, payload: bytes) -> None:
    with Path(path).open("r+b") as file:
        file.seek(offset)
        file.write(payload)


def commit(url: str, row: dict, **changes: object) -> None:
    """Lists a sample anew, with other values."""
    manifest = Manifest.open(url)
    table = pa.Table.from_pylist(
        [row | changes | {"image_fingerprint": "other"}], manifest.rows().schema
    )
    manifest.commit(table)


def test_a_whole_dataset_has_no_faults(tmp_path: Path) -> None:
    dataset = make_dataset(str(tmp_path), num_samples=10)
    done: list[tuple[int, int]] = []
    found = verify(str(tmp_path), on_progress=lambda *pair: done.append(pair))
    assert found.faults == ()
    assert (found.num_samples, found.num_files) == (13, len(dataset.shards) + 3)
    assert (found.features[EXTRACTOR].num_samples, found.features[EXTRACTOR].num_missing) == (10, 3)
    assert found.size_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.tar"))
    assert done == [(number, found.num_files) for number in range(found.num_files + 1)]


def test_a_whole_dataset_on_an_object_store_has_no_faults(object_store: str) -> None:
    make_dataset(object_store, num_samples=5)
    found = verify(object_store)
    assert (found.faults, found.num_samples) == ((), 8)


def test_regions_with_boxes_of_their_own_have_no_faults(tmp_path: Path) -> None:
    dataset = TinyDataset(str(tmp_path))
    dataset.add_features(dataset.add_shard("train", range(7)), region_values, region_boxes)
    assert verify(str(tmp_path)).faults == ()


@pytest.mark.parametrize(
    ("part", "offset", "payload", "kind"),
    [
        ("image", 0, b"I", "changed-image"),
        ("texts", 0, b"[", "malformed-texts"),
        ("image", -512, b"x", "misplaced-member"),
        ("texts", -380, b"9", "misplaced-member"),
    ],
)
def test_a_changed_byte_of_a_shard_is_named(
    tmp_path: Path, part: str, offset: int, payload: bytes, kind: str
) -> None:
    make_dataset(str(tmp_path), num_samples=9)
    row = rows(str(tmp_path))["sample-5"]
    path = shard_location(str(tmp_path), "train", row["shard"])
    overwrite(path, row[f"{part}_offset"] + offset, payload)

    found = verify(str(tmp_path))

    assert {fault.location for fault in found.faults} == {path}
    assert [(fault.kind, fault.key) for fault in found.faults] == [
        ("changed-file", ""),
        (kind, "sample-5"),
    ]


def test_a_shard_that_is_lost_or_cut_short_is_named(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), num_samples=9)
    at = rows(str(tmp_path))
    lost = shard_location(str(tmp_path), "train", at["sample-1"]["shard"])
    short = shard_location(str(tmp_path), "train", at["sample-5"]["shard"])
    Path(lost).unlink()
    os.truncate(short, at["sample-5"]["image_offset"] + 3)

    found = verify(str(tmp_path))

    by_file = {path: [f for f in found.faults if f.location == path] for path in (lost, short)}
    assert [(fault.kind, fault.key) for fault in by_file[lost]] == [("unreadable-file", "")]
    assert {fault.kind for fault in by_file[short]} == {"changed-file", "misplaced-member"}
    # Samples 4 to 7 are in it: all parts from the image of 5 on are gone.
    assert len(by_file[short]) == 1 + 3 + 3


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"image_offset": 0}, "misplaced-member"),
        ({"texts_size": 3}, "misplaced-member"),
        ({"num_captions": 77}, "miscounted-texts"),
        ({"digest": "0" * 32}, "changed-image"),
        ({"width": None}, "incomplete-row"),
        ({"shard": None, "texts_shard": None}, "incomplete-row"),
        ({"split": "other"}, "unreadable-file"),
    ],
)
def test_a_row_that_does_not_fit_its_shard_is_named(
    tmp_path: Path, changes: dict, kind: str
) -> None:
    make_dataset(str(tmp_path), num_samples=5)
    before = Manifest.open(str(tmp_path)).version
    commit(str(tmp_path), rows(str(tmp_path))["sample-2"], **changes)
    found = verify(str(tmp_path))
    assert kinds(found) == [kind]
    assert found.faults[0].key == ("" if kind == "unreadable-file" else "sample-2")
    assert verify(str(tmp_path), before).faults == ()


def test_faults_of_sidecars_are_named(tmp_path: Path) -> None:
    url = str(tmp_path)
    dataset = TinyDataset(url)
    shards = [dataset.add_shard("train", range(start, start + 3)) for start in (0, 3, 6, 9, 12)]
    dataset.write_card([2, 3])
    dataset.add_features(shards[0], grid_values)
    dataset.add_features(shards[1], lambda number: grid_values(number)[:, :7])
    dataset.add_features(shards[2], lambda number: grid_values(number)[:5])
    dataset.add_features(shards[3], lambda number: grid_values(number) * np.float16("nan"))
    dataset.add_features(shards[4], grid_values)
    Path(sidecar_location(url, EXTRACTOR, shards[4])).unlink()
    found = verify(url)
    by_shard = {
        shard: [fault.kind for fault in found.faults if shard in fault.location] for shard in shards
    }
    assert by_shard == {
        shards[0]: [],
        shards[1]: ["misshapen-feature"],
        shards[2]: ["misshapen-feature"] * 3,
        shards[3]: ["not-finite"] * 3,
        shards[4]: ["unreadable-file"],
    }


def test_a_card_that_is_lost_is_a_fault_of_the_features_that_need_it(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), num_samples=4)
    storage.remove(f"{tmp_path}/features/{EXTRACTOR}/card.json")
    found = verify(str(tmp_path))
    assert kinds(found) == ["missing-boxes"] * 4


def test_no_dataset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no manifest"):
        verify(str(tmp_path))


def test_an_error_of_a_check_ends_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(str(tmp_path), num_samples=20)
    calls = []

    def broken(*_: object) -> None:
        calls.append(1)
        raise RuntimeError("a bug")

    monkeypatch.setattr(verify_module, "_check_shard", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        verify(str(tmp_path))
