"""The recipes that come with the project, run on real photographs where there are some."""

import json
from pathlib import Path

import pytest

from pipeline.cli import run_job

COCO_TINY = str(Path(__file__).resolve().parents[2] / "jobs" / "recipes" / "coco-tiny.yaml")


@pytest.mark.slow
def test_coco_tiny_runs_on_official_files_and_captions_real_photographs(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco = shared_data / "coco"
    overrides = [
        f"dataset.source.images={coco / 'val2017'}",
        f"dataset.source.annotations={coco / 'annotations' / 'captions_val2017.json'}",
        f"dataset.path={tmp_path / 'data'}",
        f"run={tmp_path / 'run'}",
        "features.extractor.weights=random",  # no download in a test; the card says so
        "cluster={runner: process, workers: 1}",
        "training.pretrain.steps=10",
        "training.finetune.steps=10",
        "benchmarks.caption.metrics=[bleu, cider]",
    ]
    assert run_job(["run", COCO_TINY, *overrides, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert set(summary["metrics"]) == {"caption/cider", "caption/bleu4"}
    ingested = json.loads((tmp_path / "run" / "stages" / "ingest.json").read_text())["outputs"]
    assert ingested["samples"] == 64
    assert ingested["rejects"] == {"missing-image": 1936}
    (card,) = (tmp_path / "data" / "features").glob("*/card.json")
    assert json.loads(card.read_text())["weights"]["random"] is True
    results = json.loads((tmp_path / "run" / "evaluation" / "caption.results.json").read_text())
    report = (tmp_path / "run" / "report.html").read_text()
    assert 5 < len(results) < 25
    assert "data:image/jpeg" in report
