from pathlib import Path

import pyarrow as pa
import pytest
from msgspec.structs import replace

from pipeline.data.ingest.unopened import find_unopened
from pipeline.data.manifest.manifest import LIVE, REJECT, REMOVED, SAMPLES, Manifest
from pipeline.data.tars.foreign_tar import ForeignTar

ONE, OTHER = (ForeignTar(f"/tars/{name}.tar", "7-1", "settings") for name in ("one", "other"))


def row(key: str, tar: ForeignTar, num_records: int, reason: str | None = "") -> dict[str, object]:
    state = REMOVED if reason is None else REJECT if reason else LIVE
    name = tar.of(num_records).name
    return {"key": key, "split": "train", "state": state, "reason": reason or "", "tar": name}


def manifest(folder: Path, *rows: dict[str, object]) -> Manifest:
    return Manifest.create(str(folder)).commit(pa.Table.from_pylist(list(rows), SAMPLES))


def test_a_tar_is_left_unopened_if_every_record_of_it_has_a_row(tmp_path: Path) -> None:
    listed = (row("a", ONE, 2), row("b", ONE, 2, "no-texts"), row("c", OTHER, 2))
    found = find_unopened(manifest(tmp_path, *listed), [ONE, OTHER])
    assert found == {ONE: ONE.of(2).name}  # a run was killed before it listed all of the other


@pytest.mark.parametrize("changed", [{"stamp": "8-1"}, {"listing": "x"}, {"location": "/x.tar"}])
def test_another_version_or_another_setting_opens_it(
    tmp_path: Path, changed: dict[str, str]
) -> None:
    assert find_unopened(manifest(tmp_path, row("a", ONE, 1)), [replace(ONE, **changed)]) == {}


def test_a_removed_row_does_not_count(tmp_path: Path) -> None:
    listed = (row("a", ONE, 2), row("b", ONE, 2, None))
    assert find_unopened(manifest(tmp_path, *listed), [ONE]) == {}


def test_copies_are_looked_at_again_unless_nothing_at_all_has_changed(tmp_path: Path) -> None:
    copy = row("b", ONE, 2, "duplicate-image") | {"duplicate_of": "c"}
    held = manifest(tmp_path, row("a", ONE, 2), copy, row("c", OTHER, 1))
    assert set(find_unopened(held, [ONE, OTHER])) == {ONE, OTHER}
    assert set(find_unopened(held, [OTHER])) == {OTHER}  # whose samples stay
    assert set(find_unopened(held, [ONE])) == set()  # what it is a copy of leaves
    new = ForeignTar("/tars/new.tar", "1-1", "settings")
    assert set(find_unopened(held, [ONE, OTHER, new])) == {OTHER}


def test_a_source_without_tars_reads_no_manifest(tmp_path: Path) -> None:
    assert find_unopened(manifest(tmp_path, row("a", ONE, 1)), []) == {}
