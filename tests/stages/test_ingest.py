from pathlib import Path

import pytest
from rich.console import Console

from pipeline.errors import RemovalError
from pipeline.stages import ingest
from pipeline.stages.progress import StageProgress
from pipeline.stages.state import Outcome, Record
from tests.stages.small_recipe import small


def ingested(folder: Path, *overrides: str, allow_removals: bool = False) -> Outcome:
    with StageProgress(Console(stderr=True, quiet=True), ingest.NAME) as progress:
        return ingest.run(small(folder, *overrides), progress, allow_removals)


def test_it_is_done_once_and_again_for_what_is_new(tmp_path: Path) -> None:
    first, second = ingested(tmp_path), ingested(tmp_path)
    assert (first.state, first.outputs["samples"], first.outputs["added"]) == ("done", 52, 52)
    assert (second.state, second.outputs["unchanged"]) == ("up to date", 52)
    assert second.seconds == first.seconds  # of the work, which was the first's
    third = ingested(tmp_path, "dataset.source.scenes=44")
    assert (third.state, third.outputs["added"], third.outputs["samples"]) == ("done", 4, 56)
    record = Record.read(str(tmp_path / "run"), ingest.NAME)
    assert record is not None
    assert record.outputs == third.outputs


def test_another_run_of_the_same_dataset_has_nothing_to_do_and_a_record_of_its_own(
    tmp_path: Path,
) -> None:
    first = ingested(tmp_path)
    other = ingested(tmp_path, f"run={tmp_path / 'other'}")
    assert other.state == "up to date"
    record = Record.read(str(tmp_path / "other"), ingest.NAME)
    assert record is not None
    assert record.outputs["version"] == first.outputs["version"]


def test_many_samples_go_only_if_that_is_allowed(tmp_path: Path) -> None:
    ingested(tmp_path)
    with pytest.raises(RemovalError, match="36 of 52 samples would be removed"):
        ingested(tmp_path, "dataset.source.scenes=4")
    gone = ingested(tmp_path, "dataset.source.scenes=4", allow_removals=True)
    assert (gone.state, gone.outputs["removed"]) == ("done", 36)
