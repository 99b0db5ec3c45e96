from pathlib import Path

import pytest

from pipeline.cli import run_job
from pipeline.errors import ConfigError
from pipeline.stages import devices as module
from pipeline.stages.preflight import preflight
from pipeline.stages.run import STAGES
from pipeline.stages.state import Record
from tests.stages.small_recipe import QUICKSTART, small

ALL = list(STAGES)


@pytest.fixture(params=[0, 2], ids=["no-gpu", "two-gpus"])
def gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A machine with so many."""
    monkeypatch.setattr(module, "_num_gpus", lambda: request.param)
    number: int = request.param
    return number


def test_a_gpu_that_is_not_there_is_refused_before_anything_starts(
    gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asks = f"cluster={{workers: {gpus + 1}, gpus_per_worker: 1}}"
    sizes = [f"training.{phase}.global_batch_size=96" for phase in ("pretrain", "finetune")]
    assert run_job(["run", QUICKSTART, asks, *sizes]) == 64
    said = " ".join(capsys.readouterr().err.split())
    assert f"cluster.gpus_per_worker: {gpus + 1} workers want {gpus + 1} GPUs" in said
    assert f"this machine has {gpus}; use 0" in said
    assert list(tmp_path.iterdir()) == []


def test_what_there_is_and_what_is_not_needed_is_not_refused(gpus: int, tmp_path: Path) -> None:
    preflight(small(tmp_path, "cluster.gpus_per_worker=1"), ["ingest"])
    preflight(small(tmp_path, "cluster={address: auto, gpus_per_worker: 1}"), ALL)
    recipe = small(tmp_path, "cluster.gpus_per_worker=1")
    for stage in ("pretrain", "finetune"):
        Record("same", "done", 1.0, {}).write(recipe.run, stage)
    preflight(recipe, ALL)
    if gpus:
        preflight(small(tmp_path / "other", "cluster.gpus_per_worker=1"), ALL)


def test_actors_that_no_machine_holds_are_refused(gpus: int, tmp_path: Path) -> None:
    recipe = small(tmp_path, "features.extract.gpus_per_actor=3")
    with pytest.raises(ConfigError, match=f"gpus_per_actor: found 3, and this machine has {gpus} "):
        preflight(recipe, ["extract"])
    recipe = small(tmp_path, "features.extract.cpus_per_actor=999", "cluster={runner: ray}")
    with pytest.raises(ConfigError, match="cpus_per_actor: found 999, and this machine has"):
        preflight(recipe, ["extract"])
