"""Imports go down only: the walls of the house, read from every import statement."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up: the folders of the house, and the rooms and modules inside those with walls.
# `*` stands for all that a list does not name; among them there is no order.
ORDER: dict[str, list[str]] = {
    "pipeline": [
        "reason",
        "errors",
        "storage",
        "digest",
        "config",
        "scratch",
        "look_ahead",
        "ray_2_60",
        "cluster",
        "resources",
        "data",
        "vision",
        "causal_lm",
        "models",
        "pretrained",
        "objectives",
        "benchmarks",
        "training",
        "report",
        "recipe",
        "reference",
        "stages",
        "perf",
        "cli",
    ],
    "pipeline.data": [
        "sample",
        "tars",
        "media",
        "sources",
        "manifest",
        "ingest",
        "read",
        "upkeep",
        "load",
        "text",
    ],
    "pipeline.data.manifest": [
        "schema",
        "versions",
        "earlier_form",
        "engine",
        "table",
        "features",
        "manifest",
        "content",
        "index",
        "index_build",
        "retention",
        "pending_commits",
        "diff",
        "info",
    ],
    "pipeline.data.sources": [
        "base",
        "digests",
        "image_files",
        "splits",
        "gathering",
        "readers",
        "columns",
        "file_fingerprints",
        "text_kernels",
        "table_columns",
        "*",
        "merged",
    ],
    "pipeline.vision": [
        "preprocess",
        "feature",
        "extractor",
        "compress",
        "sidecar",
        "extractors",
        "extract",
    ],
    "pipeline.vision.extractors": [
        "arithmetic",
        "weights",
        "frames",
        "network",
        "backbone",
        "grid",
        "detection",
        "patches",
        "pixels",
        "published",
        "imported",
        "registry",
        "live",
    ],
    "pipeline.training": [
        "config",
        "spec",
        "lease",
        "stop_request",
        "continuation",
        "feed",
        "engine",
        "checkpoints",
        "tracking",
        "evaluation",
        "held_out",
        "assembly",
        "non_finite",
        "result",
        "loop",
        "launch",
    ],
    "pipeline.training.engine": [
        "swap_folder",
        "async_io",
        "known_keys",
        "schedule",
        "peak",
        "optimizer",
        "deepspeed_0_19",
        "deepspeed_config",
        "memory",
        "requirements",
        "swapped_state",
        "state",
        "engine",
    ],
    "pipeline.training.launch": [
        "process_group",
        "followers",
        "gauges",
        "failures",
        "recorded_spec",
        "phases",
        "in_process",
        "ray_train",
        "launch",
    ],
}

# What may meet a heavy or stateful library; everything else stays plain functions.
ONLY_IN = {
    "duckdb": {"pipeline/data/manifest/engine.py"},
    "deepspeed": {
        "pipeline/training/engine/deepspeed_0_19.py",
        "pipeline/training/engine/requirements.py",
        "pipeline/training/engine/state.py",
    },
    "ray": {
        "pipeline/perf/extract.py",
        "pipeline/cluster.py",
        "pipeline/resources.py",
        "pipeline/data/ingest/shard_tasks.py",
        "pipeline/stages/submit.py",
        "pipeline/ray_2_60.py",
        "pipeline/training/launch/failures.py",
        "pipeline/training/launch/gauges.py",
        "pipeline/training/launch/process_group.py",
        "pipeline/training/launch/ray_train.py",
        "pipeline/vision/extract.py",
    },
}

# What reaches into the private parts of a library stands in one module, named for the version.
PRIVATE_ONLY_IN = {
    "deepspeed": "pipeline/training/engine/deepspeed_0_19.py",
    "ray": "pipeline/ray_2_60.py",
}
# What is given DeepSpeed's or Ray's objects beside those that import them.
GIVEN = {
    "pipeline/training/engine/async_io.py",
    "pipeline/training/engine/engine.py",
    "pipeline/training/engine/memory.py",
    "pipeline/training/engine/optimizer.py",
    "pipeline/training/engine/swapped_state.py",
    "pipeline/training/loop.py",
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


def height(package: str, module: str) -> int | None:
    """The height of a module, or of the room that it is in, among those of a package."""
    if not module.startswith(package + "."):
        return None
    name = module.removeprefix(package + ".").split(".")[0]
    order = ORDER[package]
    if name == "__init__":
        return len(order)
    if name in order:
        return order.index(name)
    return order.index("*") if "*" in order and (path_of(package) / f"{name}.py").exists() else None


def path_of(package: str) -> Path:
    return ROOT / package.replace(".", "/")


@pytest.mark.parametrize(
    "path", python_files("pipeline"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_import_climbs(path: Path) -> None:
    importer = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for module in imported_modules(path):
        for package in ORDER:
            own, target = height(package, importer), height(package, module)
            if own is not None and target is not None:
                assert target <= own, f"{importer} imports {module}, which is above it in {package}"
        assert not module.startswith(("jobs", "tests")), f"{path}: {module}"


@pytest.mark.parametrize("package", ORDER)
def test_every_module_has_a_place_in_the_order(package: str) -> None:
    names = {path.name.removesuffix(".py") for path in path_of(package).iterdir()}
    named = set(ORDER[package])
    assert named - {"*"} <= names
    if "*" not in named:
        assert names - {"__init__", "__pycache__", "py.typed"} <= named


def test_no_two_modules_import_each_other() -> None:
    """No circle, not even of imports inside a function."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in python_files("pipeline")
        if path.name != "__init__.py"
    }
    left = {name: imported_modules(path) & set(files) - {name} for name, path in files.items()}
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"they import each other, or what does: {sorted(left)}"


def test_every_room_says_what_it_is() -> None:
    for path in python_files("pipeline"):
        if path.name == "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), path


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


def is_private(module: str) -> bool:
    """Whether a module of Ray's or DeepSpeed's is not for its users."""
    parts = module.split(".")
    return any(part.startswith("_") for part in parts) or module.startswith(
        ("ray.core.generated", "deepspeed.ops", "deepspeed.runtime.compiler")
    )


@pytest.mark.parametrize("library", PRIVATE_ONLY_IN)
def test_private_parts_of_a_library_are_imported_in_the_module_named_for_its_version(
    library: str,
) -> None:
    reaching = {
        str(path.relative_to(ROOT))
        for path in python_files("pipeline") + python_files("jobs")
        for module in imported_modules(path)
        if module.split(".")[0] == library and is_private(module)
    }
    assert reaching == {PRIVATE_ONLY_IN[library]}


def test_nobody_else_reaches_into_a_private_attribute_of_a_library() -> None:
    """In what meets Ray or DeepSpeed, `x._y` is of an object of our own: of self or cls."""
    for name in set.union(GIVEN, *ONLY_IN.values()) - set(PRIVATE_ONLY_IN.values()):
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                assert is_own or node.attr.startswith("__"), f"{name}:{node.lineno}"
            if isinstance(node, ast.keyword) and node.arg is not None:
                assert not node.arg.startswith("_"), f"{name}:{node.lineno}"
