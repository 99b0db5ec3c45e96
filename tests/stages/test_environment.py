import json
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline import __version__
from pipeline.stages.environment import write_environment
from pipeline.stages.state import Record
from tests.stages.small_recipe import small


def environment(folder: Path) -> dict[str, Any]:
    write_environment(small(folder))
    found: dict[str, Any] = json.loads((folder / "run" / "environment.json").read_text())
    return found


def test_what_a_run_is_made_with_is_known_before_its_first_stage(tmp_path: Path) -> None:
    found = environment(tmp_path)
    assert found["sightline"] == __version__
    assert found["python"] == sys.version.split()[0]
    assert torch.__version__.startswith(found["libraries"]["torch"])
    assert (found["versions"], found["stretches"]) == ({}, {})
    assert found["workers"] == 1
    assert found["dataset"] == str(tmp_path / "data")


def test_versions_are_those_that_any_phase_has_read_and_ingest_made(finished: Path) -> None:
    (finished / "run" / "pretrain").rename(finished / "run" / "pretrain.replaced-1")
    spec = finished / "run" / "finetune" / "spec.json"
    changed = json.loads(spec.read_text()) | {"dataset_version": 99}
    spec.write_text(json.dumps(changed))
    ingested = Record.read(str(finished / "run"), "ingest")
    extracted = Record.read(str(finished / "run"), "extract")
    assert ingested is not None
    assert extracted is not None
    found = environment(finished)
    ((location, versions),) = found["versions"].items()
    assert location == str(finished / "data")
    assert {ingested.outputs["version"], 99} <= set(versions)
    assert found["features"] == extracted.outputs["features"]
