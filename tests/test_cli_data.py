"""The `data` verbs of pipeline/cli.py."""

import json
import os
from pathlib import Path

import pytest

from pipeline.cli import run_job
from pipeline.data.ingest.ingest import IngestConfig, ingest
from pipeline.data.manifest.manifest import Manifest
from tests.data.world import Item, World

CONFIG = IngestConfig(samples_per_shard=4, max_reject_fraction=0.9, shards_in_flight=0)


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """Two versions: key-0 is edited in the second, key-8 is a reject."""
    url = str(tmp_path / "data")
    world = World({f"key-{n}": Item(n, f"caption {n}") for n in range(8)})
    world.items["key-8"] = Item(8, "eight", fault="not-an-image")
    ingest(world, url, CONFIG)
    world.items["key-0"] = Item(0, "edited")
    ingest(world, url, CONFIG)
    return url


def test_verify_is_status_0_of_a_whole_dataset_and_1_of_a_damaged_one(
    dataset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job(["data", "verify", dataset]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "0 faults" in shown.err
    shard = next(Path(dataset).rglob("*.tar"))
    os.truncate(shard, 600)
    assert run_job(["data", "verify", dataset, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["faults"][0]["location"] == str(shard)


def test_rejects_are_listed(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job(["data", "rejects", dataset]) == 0
    assert capsys.readouterr().out.startswith("key-8\ttrain\tnot-an-image\tkey-8: ")
    assert run_job(["data", "rejects", dataset, "--reason", "other", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_diff_lists_changes(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    newest = Manifest.open(dataset).version
    assert run_job(["data", "diff", dataset, str(newest - 1), str(newest)]) == 0
    shown = capsys.readouterr()
    assert shown.out == "texts\tkey-0\ttrain\t\n"
    assert "texts 1" in shown.err
    assert run_job(["data", "diff", dataset, "0", str(newest), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"added": 8, "rejected": 1}


def test_compact_keeps_the_versions_of_runs(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "environment.json").write_text(json.dumps({"versions": {dataset: [1]}}))
    arguments = ["data", "compact", dataset, "--last-versions", "1", "--run", str(tmp_path)]
    assert run_job([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == "all from 0 on"  # they are young
    assert run_job(arguments) == 0
    assert "0 files removed" in capsys.readouterr().out
    assert run_job(["data", "compact", dataset, "--run", dataset]) == 1
    assert "environment.json" in capsys.readouterr().err


def test_a_bracket_in_what_is_told_is_shown(
    dataset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bracketed = str(Path(dataset).with_name("[bold]set"))
    assert run_job(["data", "info", bracketed]) == 1
    assert "[bold]set" in "".join(capsys.readouterr().err.split())
