from pathlib import Path

import pytest

from tests.order import DEALT_OUT_SINGLY, LONGEST, SHARING_RAY, unit_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("file", [*LONGEST, *SHARING_RAY, *DEALT_OUT_SINGLY])
def test_every_file_that_is_named_is_there(file: str) -> None:
    assert (ROOT / file).is_file()
    assert file in LONGEST


def test_the_tests_of_a_file_stay_together_unless_they_are_long_and_share_nothing() -> None:
    assert unit_of("tests/test_cli.py::test_a[1::2]") == "tests/test_cli.py"
    long = "tests/training/test_loop.py::test_a"
    assert unit_of(f"{long}[1]") != unit_of(f"{long}[2]")
    assert unit_of("tests/test_resources.py::T::t") == unit_of("tests/vision/test_extract.py::t")


def test_whoever_uses_the_shared_ray_is_dealt_out_with_it() -> None:
    using = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "ray_local" in path.read_text()
    }
    assert using - {"tests/test_order.py", "tests/test_processes.py"} == set(SHARING_RAY)
