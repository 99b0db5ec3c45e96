"""What a wheel of the project holds."""

import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def test_a_wheel_holds_the_library_and_no_name_that_many_have_for_their_own() -> None:
    setuptools = pytest.importorskip("setuptools")
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    include = settings["packages"]["find"]["include"]
    found = setuptools.find_namespace_packages(str(REPOSITORY), include=include)
    assert {name.split(".")[0] for name in found} == {"pipeline"}
    assert {"pipeline.stages", "pipeline.data.sources"} <= set(found)
    assert settings["package-data"].keys() == {"pipeline"}
