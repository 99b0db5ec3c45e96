from pathlib import Path

import pytest
from msgspec.structs import replace

from pipeline.data.ingest.unopened import find_unopened
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import SampleRow, State, to_table
from pipeline.data.tars.foreign_tar import ForeignTar

ONE, OTHER = (ForeignTar(f"/tars/{name}.tar", "7-1", "settings") for name in ("one", "other"))


def row(
    key: str, tar: ForeignTar, num_records: int, state: State = State.LIVE, duplicate_of: str = ""
) -> SampleRow:
    return SampleRow(
        key=key,
        split="train",
        state=state,
        image_fingerprint="1",
        texts_fingerprint="2",
        tar=replace(tar, num_records=num_records),
        duplicate_of=duplicate_of,
    )


def manifest(folder: Path, *rows: SampleRow) -> Manifest:
    return Manifest.create(str(folder)).commit(to_table(rows, SampleRow))


def test_a_tar_is_left_unopened_if_every_record_of_it_has_a_row(tmp_path: Path) -> None:
    listed = (row("a", ONE, 2), row("b", ONE, 2, State.REJECT), row("c", OTHER, 2))
    found = find_unopened(manifest(tmp_path, *listed), [ONE, OTHER])
    assert found == {
        ONE: replace(ONE, num_records=2)
    }  # a run was killed before it listed all of the other


@pytest.mark.parametrize("changed", [{"stamp": "8-1"}, {"listing": "x"}, {"location": "/x.tar"}])
def test_another_version_or_another_setting_opens_it(
    tmp_path: Path, changed: dict[str, str]
) -> None:
    assert find_unopened(manifest(tmp_path, row("a", ONE, 1)), [replace(ONE, **changed)]) == {}


def test_a_removed_row_does_not_count(tmp_path: Path) -> None:
    listed = (row("a", ONE, 2), row("b", ONE, 2, State.REMOVED))
    assert find_unopened(manifest(tmp_path, *listed), [ONE]) == {}


def test_copies_are_looked_at_again_unless_nothing_at_all_has_changed(tmp_path: Path) -> None:
    copy = row("b", ONE, 2, State.REJECT, duplicate_of="c")
    held = manifest(tmp_path, row("a", ONE, 2), copy, row("c", OTHER, 1))
    assert set(find_unopened(held, [ONE, OTHER])) == {ONE, OTHER}
    assert set(find_unopened(held, [OTHER])) == {OTHER}  # whose samples stay
    assert set(find_unopened(held, [ONE])) == set()  # what it is a copy of leaves
    new = ForeignTar("/tars/new.tar", "1-1", "settings")
    assert set(find_unopened(held, [ONE, OTHER, new])) == {OTHER}


def test_a_source_without_tars_reads_no_manifest(tmp_path: Path) -> None:
    assert find_unopened(manifest(tmp_path, row("a", ONE, 1)), []) == {}
