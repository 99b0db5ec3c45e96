"""Every module has its tests where its name says: tests/data/test_x.py holds pipeline/data/x.py."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Modules whose tests are of those that use them, and why.
THROUGH_OTHERS = {
    "benchmarks/base.py": "an interface: its implementations",
    "data/ingest/comparison.py": "the comparison of a listing with a manifest: ingest",
    "data/ingest/ingest_plan.py": "the plan that ingest carries out: ingest",
    "data/ingest/outcome.py": "a type without code: ingest",
    "data/manifest/index.py": "the index of a split: dataset",
    "data/manifest/table.py": "a table of the manifest: manifest",
    "data/manifest/versions.py": "the versions of a manifest: manifest, retention",
    "data/media/unpacking.py": "one limit: frame_zip, dicom_file",
    "data/read/features.py": "the arrays of a split: dataset, sidecar_layout",
    "data/read/rows.py": "the rows of a split: dataset",
    "data/sources/columns.py": "the columns of a table: table, table_columns",
    "data/sources/digests.py": "one digest: every source",
    "data/sources/file_fingerprints.py": "what tells that a file changed: image_files, folder",
    "data/sources/text_kernels.py": "texts of whole columns: table",
    "data/upkeep/rewrite.py": "shards written anew: compact",
    "errors.py": "types without code: whoever raises them",
    "models/two_stream.py": "a base of two families: lxmert, vilbert",
    "objectives/base.py": "an interface: families",
    "objectives/teacher.py": "a teacher's outputs: distill",
    "objectives/token_objective.py": "a base of objectives: mlm, lm",
    "perf/benches.py": "a list of benches: cli",
    "perf/loader_data.py": "what a bench reads: loader",
    "perf/loader_peers.py": "what a bench compares with: loader",
    "perf/start_up.py": "a process that a bench times: train",
    "perf/own_process.py": "a process that a bench times: rerun, scale_steps",
    "reason.py": "an enumeration: whoever counts rejects",
    "report/titles.py": "names without code: sentence, phase_charts",
    "stages/publish.py": "the model that a run leaves: run, changed",
    "stages/tokenizer.py": "the tokenizer of a run: train, run",
    "training/feed/micro_batch.py": "a type without code: device_feed",
    "training/launch/followers.py": "the followers of a run: launch",
    "training/launch/phases.py": "the phases of a run: launch",
    "training/launch/recorded_spec.py": "the spec in a run's folder: launch",
    "vision/extractors/arithmetic.py": "settings of torch: grid",
    "vision/extractors/detection/detector.py": "the networks that find regions: regions, segments",
    "vision/extractors/network.py": "a network cut at a node: grid",
}


def test_every_module_has_its_tests_beside_it_or_a_reason_why_not() -> None:
    modules = {
        str(path.relative_to(ROOT / "pipeline"))
        for path in (ROOT / "pipeline").rglob("*.py")
        if path.name != "__init__.py"
    }
    untested = {name for name in modules if not place_of_tests(name).exists()}
    assert untested - set(THROUGH_OTHERS) == set(), "write their tests, or say who tests them"
    told = {name for name in THROUGH_OTHERS if place_of_tests(name).exists()}
    assert told == set(), "they have tests of their own now"


def place_of_tests(module: str) -> Path:
    path = Path(module)
    return ROOT / "tests" / path.parent / f"test_{path.name}"
