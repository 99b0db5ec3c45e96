"""Trackers that write to this disk, read back by their own readers."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.errors import ConfigError
from pipeline.training.tracking.trackers import TrackersConfig, figures, tracking

RECIPE = {"name": "birds", "training": {"seed": 3}}


def line(phase: str, step: int, loss: float) -> dict[str, Any]:
    return {
        "phase": phase,
        "step": step,
        "loss": loss,
        "losses": {"mlm": loss / 2, "itm": loss / 4},
        "lr": 0.1,
        "time": 1.7e9 + step,
    }


LINES = [line("pretrain", 1, 2.0), line("pretrain", 2, 1.5), line("finetune", 1, 1.0)]


def needs(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


def tell(settings: dict[str, Any], run: Path, lines: list[dict[str, Any]]) -> None:
    trackers = config.check(TrackersConfig, settings, "trackers")
    with tracking(trackers, str(run), "birds", RECIPE) as listen:
        listen({"phase": "pretrain", "event": "started", "step": 0})
        for one in lines:
            listen(one)


def test_figures_are_flat_numbers_without_the_step_and_the_time() -> None:
    assert figures(LINES[0]) == {"loss": 2.0, "losses/mlm": 1.0, "losses/itm": 0.5, "lr": 0.1}


def test_tensorboard_shows_each_phase_and_hides_steps_that_are_made_again(tmp_path: Path) -> None:
    needs("tensorboard")
    from tensorboard.backend.event_processing import (  # type: ignore[import-untyped]
        event_accumulator,
    )

    tell({"tensorboard": {}}, tmp_path, LINES)
    tell({"tensorboard": {}}, tmp_path, [line("pretrain", 2, 1.25), line("pretrain", 3, 1.125)])
    found = {}
    for phase in ("pretrain", "finetune"):
        events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard" / phase))
        events.Reload()
        found[phase] = [(point.step, point.value) for point in events.Scalars("losses/mlm")]
    assert found == {"pretrain": [(1, 1.0), (2, 0.625), (3, 0.5625)], "finetune": [(1, 0.5)]}


def test_mlflow_keeps_one_run_of_a_command_that_was_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    settings = {"mlflow": {"uri": uri, "experiment": "birds"}}
    tell(settings, tmp_path / "run", LINES)
    tell(settings, tmp_path / "run", [line("finetune", 2, 0.5)])
    tell(settings, tmp_path / "another", [line("finetune", 1, 9.0)])
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("birds")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], order_by=["attribute.start_time"])
    assert len(runs) == 2
    history = client.get_metric_history(runs[0].info.run_id, "finetune/loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5)]
    assert runs[0].info.status == "FINISHED"


@pytest.mark.processes
def test_wandb_writes_its_files_into_the_run_when_it_is_offline(tmp_path: Path) -> None:
    needs("wandb")
    import wandb

    tell({"wandb": {"mode": "offline", "project": "birds"}}, tmp_path, LINES)
    wandb.teardown()  # as a process does when it ends: until then wandb's service may still write
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    written = log.read_bytes()
    assert b"pretrain/losses/mlm" in written
    assert b"finetune/step" in written


def test_a_tracker_without_its_library_is_refused_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else name)
    trackers = config.check(TrackersConfig, {"wandb": {}, "tensorboard": {}}, "trackers")
    with pytest.raises(ConfigError, match=r"trackers.wandb: .*`pip install wandb`") as refusal:
        trackers.check()
    assert "tensorboard" not in str(refusal.value)
