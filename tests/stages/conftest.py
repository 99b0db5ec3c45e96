"""Fixtures of the stages' tests."""

import shutil
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.stages.run import STAGES, run_stages
from tests.stages.small_recipe import small
from tests.training.conftest import alone

__all__ = ["alone"]


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small recipe's data, and no run."""
    folder = tmp_path_factory.mktemp("extracted")
    run_stages(small(folder), ["ingest", "extract"], Console(stderr=True, quiet=True))
    return folder


@pytest.fixture(scope="session")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder in which the small recipe has been run once, and a copy of it."""
    folder, copy = tmp_path_factory.mktemp("finished"), tmp_path_factory.mktemp("copy")
    run_stages(small(folder), list(STAGES), Console(stderr=True, quiet=True))
    return folder, Path(shutil.copytree(folder, copy / "finished"))


@pytest.fixture
def finished(run_once: tuple[Path, Path]) -> Path:
    """The folder as it was after its run, whatever other tests have made of it since."""
    folder, copy = run_once
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)
    return folder
