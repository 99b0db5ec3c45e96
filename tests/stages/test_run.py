"""A recipe's stages on one process: small, but every part of it real."""

import json
import shutil
from pathlib import Path
from typing import Literal

import pytest
from rich.console import Console

from pipeline import config, storage
from pipeline.cli import run_job
from pipeline.data.manifest.retention import Retention
from pipeline.data.read.dataset import Dataset
from pipeline.data.upkeep.compact import compact
from pipeline.errors import ConfigError, StageError
from pipeline.pretrained.files import is_model
from pipeline.recipe import Recipe
from pipeline.stages.changed import OnChange
from pipeline.stages.run import STAGES, run_stages
from pipeline.stages.state import Record
from pipeline.training.launch.recorded_spec import read_spec
from pipeline.training.tracking.metrics_log import read_metrics
from tests.stages.small_recipe import QUICKSTART, SMALL, small


def states(
    folder: Path, *overrides: str, decision: Literal["refuse", "continue", "restart"] = "refuse"
) -> dict[str, str]:
    recipe = small(folder, *overrides)
    console = Console(stderr=True, quiet=True)
    summary = run_stages(recipe, list(STAGES), console, OnChange(decision))
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


@pytest.mark.parametrize("damaged", [b"", b'{"name": ', b"[1]", b'{"stages": 3, "metrics": []}'])
def test_a_summary_that_nobody_can_read_is_written_anew(finished: Path, damaged: bytes) -> None:
    (finished / "run" / "summary.json").write_bytes(damaged)
    assert set(states(finished)) == set(STAGES)


def test_the_record_names_the_features_of_the_recipe_when_all_are_there(
    finished: Path, tmp_path: Path
) -> None:
    own = small(finished, f"run={tmp_path / 'run'}")
    patches = ["features.extractor.image_size=16", "features.extractor.patch_size=8"]
    coarse = small(finished, f"run={tmp_path / 'run'}", *patches)
    names = []
    for recipe in (own, coarse, own):
        run_stages(recipe, ["extract"], Console(stderr=True, quiet=True))
        record = Record.read(str(tmp_path / "run"), "extract")
        assert record is not None
        names.append(record.outputs["features"])
    assert names[0] == names[2] != names[1]


def test_a_model_is_scored_on_features_of_its_own_extractor(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    finer = ["features.extractor.image_size=48", "features.extractor.patch_size=8"]
    other = small(finished, f"run={tmp_path / 'run'}", *finer)
    quiet = Console(stderr=True, quiet=True)
    run_stages(other, ["extract"], quiet)
    with pytest.raises(ConfigError, match=r"features\.extractor: .* was trained on features of"):
        run_stages(other, ["evaluate"], quiet)


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


def files(folder: Path) -> dict[str, int]:
    """All that training has left in a run, by path, with when it was written."""
    found = (path for phase in folder.iterdir() for path in phase.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in found}


def test_what_only_an_evaluation_depends_on_trains_nothing(finished: Path) -> None:
    trained = files(finished / "run" / "finetune")
    caption = ["benchmarks.caption.beams=2", "benchmarks.caption.max_tokens=9"]
    for overrides in (
        [*caption, "benchmarks.caption.metrics=[bleu, cider]"],
        ["training.blind_twin=false"],
        [],
    ):
        assert states(finished, *overrides) == {
            "ingest": "up to date",
            "extract": "up to date",
            "pretrain": "up to date",
            "finetune": "up to date",
            "evaluate": "done",
            "report": "done",
        }
    assert files(finished / "run" / "finetune") == trained


def test_a_blind_twin_that_is_wished_for_later_is_trained_alone_wherever_all_lies_by_then(
    finished: Path, tmp_path: Path
) -> None:
    for name in ("run", "data"):
        shutil.copytree(finished / name, tmp_path / name)
    shutil.rmtree(tmp_path / "run" / "blind")
    trained = files(tmp_path / "run" / "finetune")
    assert states(tmp_path)["pretrain"] == "up to date"
    assert files(tmp_path / "run" / "finetune") == trained
    assert is_model(str(tmp_path / "run" / "blind" / "model"))


def test_another_learning_rate_is_refused_and_trained_anew_only_if_asked(finished: Path) -> None:
    run, rate = finished / "run", "training.finetune.optimizer.learning_rate=1e-4"
    before, recipe = files(run), (run / "recipe.yaml").read_bytes()
    with pytest.raises(ConfigError) as refusal:
        states(finished, rate)
    told = str(refusal.value).splitlines()
    assert told == [
        f"finetune in {run} is finished, with 3 steps, and was begun with other settings:",
        "  training.finetune.optimizer.learning_rate: 0.002 then, 0.0001 now",
        "It has made all of its steps, so that the new settings would have none to act on; with a "
        "larger training.finetune.steps and --from-checkpoint it goes on.",
        "To train finetune anew (what is there is moved to finetune.replaced-1, nothing is "
        "deleted):",
        "  sightline run RECIPE --restart",
        "To start another run from its weights:",
        f"  sightline run RECIPE run={run}-2 model.initial={run}/finetune/model "
        f"model.tokenizer={run}/finetune/model training.pretrain=null objectives=null",
    ]
    assert files(run) == before
    assert (run / "recipe.yaml").read_bytes() == recipe
    assert states(finished, rate, decision="restart") == {
        "ingest": "up to date",
        "extract": "up to date",
        "pretrain": "up to date",
        "finetune": "done",
        "evaluate": "done",
        "report": "done",
    }
    kept = {name: time for name, time in before.items() if name.startswith("finetune/")}
    moved = {f"finetune.replaced-1/{name.split('/', 1)[1]}": kept[name] for name in kept}
    assert moved.items() <= files(run).items()
    assert set(states(finished, rate, decision="restart").values()) == {"up to date"}


def test_a_finished_run_is_trained_on_to_more_steps(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    data = f"dataset.path={finished / 'data'}"
    more = [data, "training.finetune.steps=5"]
    with pytest.raises(ConfigError, match=r"To go on from step 3 .*\n  .* --from-checkpoint\n"):
        states(tmp_path, *more)
    assert states(tmp_path, *more, decision="continue")["finetune"] == "done"
    run = tmp_path / "run"
    assert [line["step"] for line in read_metrics(str(run / "finetune"))][-1] == 5
    environment = json.loads((run / "environment.json").read_text())
    (stretch,) = environment["stretches"]["finetune"]
    assert stretch["after_step"] == 3
    assert stretch["changed"] == {"training.finetune.steps": {"then": 3, "now": 5}}
    assert list(environment["stretches"]) == ["finetune", "blind"]
    assert "after step 3" in (run / "report.html").read_text()
    assert json.loads((run / "model" / "sightline.json").read_text())["step"] == 5
    for phase in ("finetune", "blind"):
        assert is_model(str(run / phase / "model.step-00000003"))
    assert set(states(tmp_path, *more).values()) == {"up to date"}
    with pytest.raises(ConfigError, match="at step 5, is past the new steps=3"):
        states(tmp_path, data, "training.finetune.steps=3", decision="continue")


def test_an_unfinished_run_goes_on_with_the_data_that_it_began_with(
    finished: Path, tmp_path: Path
) -> None:
    for name in ("run", "data"):
        shutil.copytree(finished / name, tmp_path / name)
    pretrain = tmp_path / "run" / "pretrain"
    began = read_spec(str(pretrain)).dataset_version
    (pretrain / "result.json").unlink()
    shutil.rmtree(pretrain / "model")
    places = [f"dataset.path={tmp_path / 'data'}"]
    # the spec names the dataset that it was begun with: here it is a copy
    spec = json.loads((pretrain / "spec.json").read_text()) | {"dataset": str(tmp_path / "data")}
    (pretrain / "spec.json").write_text(json.dumps(spec))
    console = Console(stderr=True, quiet=True)
    recipe = small(tmp_path, *places, "dataset.source.scenes=44")
    run_stages(recipe, ["ingest", "extract", "pretrain"], console)
    assert Dataset.open(str(tmp_path / "data")).version > began
    assert read_spec(str(pretrain)).dataset_version == began
    with pytest.raises(ConfigError) as refusal:  # what is finished would have to be trained anew
        run_stages(recipe, ["pretrain"], console, OnChange("continue"))
    assert "dataset.path: split train: what is there has changed" in str(refusal.value)


def test_what_changes_no_training_sample_trains_nothing_again(finished: Path) -> None:
    for number in (13, 14):
        more = [f"dataset.source.validation_scenes={number}"]
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
        summary = run_stages(recipe, ["pretrain"], console, OnChange("restart"))
        assert summary["stages"]["pretrain"]["state"] == state
    spec = read_spec(str(tmp_path / "mixed" / "pretrain"))
    assert [part.weight for part in spec.mixed_in] == [3]


def test_a_vanished_model_is_made_again(finished: Path) -> None:
    (finished / "run" / "model" / "sightline.json").unlink()
    assert states(finished)["finetune"] == "done"


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
