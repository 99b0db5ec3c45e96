"""What the pages name, held against what is there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_test_that_the_faults_name_is_there() -> None:
    text = (ROOT / "docs" / "faults.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::([\w:]+))?", text)
    assert len(named) > 100
    for file, names in named:
        code = (ROOT / file).read_text()
        for name in filter(None, names.split("::")):
            assert re.search(rf"(def|class) {name}\b", code), f"{file}::{name}"


def test_every_module_that_the_architecture_names_is_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    modules = re.findall(r"`((?:\w+/)+\w+\.py)`", text)
    assert len(modules) > 20
    for module in modules:
        assert (ROOT / "pipeline" / module).exists() or (ROOT / module).exists(), module


def test_every_module_of_the_rooms_is_named_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for hall in ("data", "vision", "training"):
        for path in (ROOT / "pipeline" / hall).rglob("[a-z]*.py"):
            assert f"`{path.stem}`" in text, f"{hall}: {path.name}"


def test_every_function_on_the_trip_of_a_record_is_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    (trip,) = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    stations = re.findall(r"((?:\w+/)+\w+\.py) +([A-Za-z_][\w., ]*\w)", trip)
    assert len(stations) > 12
    for module, names in stations:
        code = (ROOT / "pipeline" / module).read_text()
        for name in re.split(r"[., ]+", names):
            assert re.search(rf"(def|class) {name}\b", code), f"{module}: {name}"


def test_pages_that_the_readme_links_to_are_there() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert "://" in link or (ROOT / link).exists(), link
