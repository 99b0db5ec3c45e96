"""Imports go down only: the walls of the house, read from every import statement."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ORDER = [
    "errors",
    "storage",
    "config",
    "scratch",
    "cluster",
    "room",
    "data",
    "vision",
    "causal_lm",
    "models",
    "model_files",
    "objectives",
    "benchmarks",
    "training",
    "inspect",
    "recipe",
    "stages",
    "bench",
    "cli",
]

# What may meet a heavy or stateful library; everything else stays plain functions.
ONLY_IN = {
    "deepspeed": {"pipeline/training/engine.py"},
    "ray": {
        "pipeline/bench/extract.py",
        "pipeline/cluster.py",
        "pipeline/room.py",
        "pipeline/data/ingest/shard_tasks.py",
        "pipeline/stages/submit.py",
        "pipeline/training/launch.py",
        "pipeline/vision/extract.py",
    },
}


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Every module a file names in an import, at its top or inside a function."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            modules.add(node.module)
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def layer(module: str) -> int | None:
    """The height of a `pipeline` module in the order, or None for anything else."""
    parts = module.split(".")
    if parts[0] != "pipeline" or len(parts) < 2 or parts[1] not in ORDER:
        return None
    return ORDER.index(parts[1])


@pytest.mark.parametrize("path", python_files("pipeline"), ids=lambda path: path.name)
def test_no_import_climbs(path: Path) -> None:
    own = layer(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for module in imported_modules(path):
        target = layer(module)
        if own is not None and target is not None:
            assert target <= own, f"{path.relative_to(ROOT)} imports {module}, which is above it"
        assert not module.startswith(("jobs", "tests")), f"{path}: {module}"


def test_every_module_of_the_pipeline_has_a_place_in_the_order() -> None:
    names = {path.name.removesuffix(".py") for path in (ROOT / "pipeline").iterdir()}
    assert names - {"__init__", "__pycache__", "py.typed"} <= set(ORDER)


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_stateful_library_is_met_in_few_modules(library: str) -> None:
    meeting = {
        str(path.relative_to(ROOT))
        for path in python_files("pipeline") + python_files("jobs")
        if any(module.split(".")[0] == library for module in imported_modules(path))
    }
    assert meeting <= ONLY_IN[library]


def test_models_know_torch_only() -> None:
    for path in python_files("pipeline/models"):
        roots = {module.split(".")[0] for module in imported_modules(path)}
        assert not roots & {"ray", "deepspeed", "transformers", "pathlib", "os"}, path


def test_data_knows_no_torch() -> None:
    scaling = {"images.py", "image_pixels.py"}  # by torch's kernel, five times as fast as Pillow's
    for path in python_files("pipeline/data"):
        roots = {module.split(".")[0] for module in imported_modules(path)}
        assert "torch" not in roots or path.name in scaling, path


def test_jobs_are_imported_by_nothing_but_tests() -> None:
    for path in python_files("pipeline"):
        assert not any(module.split(".")[0] == "jobs" for module in imported_modules(path)), path
