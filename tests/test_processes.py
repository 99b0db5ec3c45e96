"""The split of the tests, held by a pytest of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import multiprocessing
import subprocess
import sys

import pytest


@pytest.fixture
def ray_local():
    subprocess.run([sys.executable, "-c", ""], check=True)


def test_stays():
    subprocess.run(["tar", "--version"], check=True)


def test_leaves():
    subprocess.run([sys.executable, "-c", ""], check=True)


def test_spawns():
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=print)
    process.start()
    process.join()


@pytest.fixture
def starts():
    subprocess.run([sys.executable, "-c", ""], check=True)


def test_leaves_in_a_fixture(starts):
    pass


def test_is_marked_by_its_fixture(ray_local):
    pass


@pytest.mark.processes
def test_is_marked():
    subprocess.run([sys.executable, "-c", ""], check=True)


@pytest.mark.slow
def test_is_slow():
    pass
"""


@pytest.mark.processes
def test_in_fast_mode_a_test_that_starts_a_process_is_left_out_or_fails(tmp_path: Path) -> None:
    (tmp_path / "test_split.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    processes\n    slow\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.processes", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"--rootdir={tmp_path}", "--fast", "-v", str(tmp_path)],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    outcomes = {
        line.split("::")[1].split()[0]: line.split()[1]
        for line in done.stdout.splitlines()
        if "::" in line and "%" in line
    }
    assert outcomes == {
        "test_stays": "PASSED",
        "test_leaves": "FAILED",
        "test_spawns": "FAILED",
        "test_leaves_in_a_fixture": "ERROR",
    }
    assert "is to be marked `processes`" in done.stdout
    assert "3 deselected" in done.stdout
