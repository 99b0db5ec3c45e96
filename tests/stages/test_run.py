"""A recipe's stages on one process: small, but every part of it real."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from pipeline import config, storage
from pipeline.cli import run_job
from pipeline.data.compact import compact
from pipeline.data.dataset import Dataset
from pipeline.data.retention import Retention
from pipeline.errors import StageError
from pipeline.recipe import Recipe
from pipeline.stages.run import STAGES, run_stages
from pipeline.training.launch import read_spec

QUICKSTART = str(Path(__file__).resolve().parents[2] / "jobs" / "recipes" / "quickstart.yaml")
SMALL = [
    "dataset.source.scenes=40",
    "dataset.source.validation_scenes=12",
    "dataset.ingest.samples_per_shard=16",
    "cluster={runner: process, workers: 1}",
    "model.sizes={width: 16, num_layers: 1, num_heads: 2, intermediate_size: 24, "
    "max_positions: 32, dropout: 0.0, position_fourier: 8}",
    *(
        f"training.{phase}.{setting}"
        for phase in ("pretrain", "finetune")
        for setting in ("steps=3", "global_batch_size=8", "micro_batch_size=4", "warmup_steps=1")
    ),
]


def small(run: Path, *overrides: str) -> Recipe:
    places = [f"run={run / 'run'}", f"dataset.path={run / 'data'}"]
    return config.load(Recipe, QUICKSTART, [*SMALL, *places, *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the small recipe has been run once."""
    folder = tmp_path_factory.mktemp("finished")
    run_stages(small(folder), list(STAGES), Console(stderr=True, quiet=True))
    return folder


def states(folder: Path, *overrides: str) -> dict[str, str]:
    recipe = small(folder, *overrides)
    summary = run_stages(recipe, list(STAGES), Console(stderr=True, quiet=True))
    return {name: stage["state"] for name, stage in summary["stages"].items()}


def test_a_run_leaves_what_the_design_says(finished: Path) -> None:
    summary = json.loads((finished / "run" / "summary.json").read_text())
    assert {stage["state"] for stage in summary["stages"].values()} == {"done"}
    assert {"vqa/accuracy", "vqa/accuracy_blind", "caption/cider"} <= set(summary["metrics"])
    environment = json.loads((finished / "run" / "environment.json").read_text())
    assert [len(versions) for versions in environment["versions"].values()] == [1]
    for name in ("recipe.yaml", "report.html", "model/config.json", "evaluation/metrics.json"):
        assert (finished / "run" / name).exists(), name


def test_a_second_run_does_nothing(finished: Path) -> None:
    before = (finished / "run" / "report.html").stat().st_mtime_ns
    assert set(states(finished).values()) == {"up to date"}
    assert (finished / "run" / "report.html").stat().st_mtime_ns == before


def test_predict_answers_and_captions(
    finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    image = tmp_path / "photo.jpg"
    image.write_bytes(Dataset.open(str(finished / "data")).split("validation").image(0))
    run = str(finished / "run")
    assert run_job(["predict", run, "--image", str(image), "--json"]) == 0
    assert "text" in json.loads(capsys.readouterr().out)
    asked = ["--question", "Is there a circle?", "--json"]
    assert run_job(["predict", run, "--image", str(image), *asked]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert answers[0]["score"] >= answers[1]["score"]
    image.write_bytes(b"not an image")
    assert run_job(["predict", run, "--image", str(image)]) == 1
    assert "photo.jpg" in capsys.readouterr().err


def test_another_learning_rate_runs_only_what_depends_on_it(finished: Path) -> None:
    assert states(finished, "training.finetune.learning_rate=1e-4") == {
        "ingest": "up to date",
        "extract": "up to date",
        "pretrain": "up to date",
        "finetune": "done",
        "evaluate": "done",
        "report": "done",
    }


def test_what_changes_no_training_sample_trains_nothing_again(finished: Path) -> None:
    rate = "training.finetune.learning_rate=1e-4"
    for number in (13, 14):
        more = [rate, f"dataset.source.validation_scenes={number}"]
        assert states(finished, *more) == {
            "ingest": "done",
            "extract": "done",
            "pretrain": "up to date",
            "finetune": "up to date",
            "evaluate": "done",
            "report": "done",
        }
    before = Dataset.open(str(finished / "data")).version
    compact(str(finished / "data"), Retention(last_versions=1))
    assert Dataset.open(str(finished / "data")).version > before  # small shards became one
    assert set(states(finished, *more).values()) == {"up to date"}


def test_a_dataset_that_another_recipe_made_is_mixed_in(finished: Path, tmp_path: Path) -> None:
    console = Console(stderr=True, quiet=True)
    other = small(tmp_path, "dataset.source.seed=1", "dataset.source.scenes=20")
    run_stages(other, ["ingest", "extract"], console)
    mixed = [f"run={tmp_path / 'mixed'}", f"dataset.path={finished / 'data'}"]
    for weight, state in ((1, "done"), (1, "up to date"), (3, "done")):
        part = f"dataset.mixed_in=[{{path: {other.dataset.path}, weight: {weight}}}]"
        recipe = config.load(Recipe, QUICKSTART, [*SMALL, *mixed, part])
        summary = run_stages(recipe, ["pretrain"], console)
        assert summary["stages"]["pretrain"]["state"] == state
    spec = read_spec(str(tmp_path / "mixed" / "pretrain"))
    assert [part.weight for part in spec.mixed_in] == [3]


def test_a_vanished_model_is_made_again(finished: Path) -> None:
    (finished / "run" / "model" / "sightline.json").unlink()
    overrides = ["training.finetune.learning_rate=1e-4", "dataset.source.validation_scenes=14"]
    assert states(finished, *overrides)["finetune"] == "done"


def test_a_benchmark_without_texts_is_refused(finished: Path, tmp_path: Path) -> None:
    recipe = small(tmp_path, f"dataset.path={finished / 'data'}")
    with pytest.raises(StageError, match="sightline pretrain"):
        run_stages(recipe, ["finetune"], Console(stderr=True, quiet=True))


def test_a_run_and_its_dataset_lie_in_an_object_store(
    object_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = [f"run={object_store}/run", f"dataset.path={object_store}/dataset"]
    recipe = config.load(Recipe, QUICKSTART, [*SMALL, *places])
    console = Console(stderr=True, quiet=True)
    first, second = (run_stages(recipe, list(STAGES), console) for _ in range(2))
    assert {stage["state"] for stage in first["stages"].values()} == {"done"}
    assert {stage["state"] for stage in second["stages"].values()} == {"up to date"}
    assert second["metrics"] == first["metrics"]
    summary = json.loads(storage.read_bytes(f"{object_store}/run/summary.json"))
    assert summary["metrics"] == first["metrics"]
    assert list(tmp_path.iterdir()) == []
