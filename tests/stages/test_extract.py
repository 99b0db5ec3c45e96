from pathlib import Path

import pytest
from rich.console import Console

from pipeline.data.read.dataset import Dataset
from pipeline.errors import ConfigError
from pipeline.stages import extract
from pipeline.stages.progress import StageProgress
from pipeline.stages.run import run_stages
from pipeline.stages.state import Outcome, Record
from tests.stages.small_recipe import small

QUIET = Console(stderr=True, quiet=True)


def extracted(folder: Path, *overrides: str) -> Outcome:
    with StageProgress(QUIET, extract.NAME) as progress:
        return extract.run(small(folder, *overrides), progress)


def test_it_is_done_once_and_again_for_what_is_new(tmp_path: Path) -> None:
    run_stages(small(tmp_path), ["ingest"], QUIET)
    first, second = extracted(tmp_path), extracted(tmp_path)
    assert (first.state, first.outputs["images"]) == ("done", 52)
    assert (second.state, second.outputs) == ("up to date", first.outputs)
    run_stages(small(tmp_path, "dataset.source.scenes=44"), ["ingest"], QUIET)
    third = extracted(tmp_path, "dataset.source.scenes=44")
    assert (third.state, third.outputs["images"], third.outputs["unchanged"]) == ("done", 4, 52)
    split = Dataset.open(str(tmp_path / "data")).split("train", third.outputs["features"])
    assert split.num_samples == 44


def test_features_that_are_made_as_pictures_are_read_are_not_stored(tmp_path: Path) -> None:
    live = "features.live=true"
    run_stages(small(tmp_path, live), ["ingest"], QUIET)
    assert extracted(tmp_path, live).state == "nothing to store"
    assert not (tmp_path / "data" / "features").exists()
    assert Record.read(str(tmp_path / "run"), extract.NAME) is None


def test_a_split_that_is_not_there_is_refused_before_any_work(tmp_path: Path) -> None:
    run_stages(small(tmp_path), ["ingest"], QUIET)
    with pytest.raises(ConfigError, match=r"dataset\.validation_split: found 'val'"):
        extracted(tmp_path, "dataset.validation_split=val")
    assert not (tmp_path / "data" / "features").exists()
