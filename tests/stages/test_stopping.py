"""A command that is told to stop: by a cluster that wants its machine back, or by Ctrl-C."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.stages.run import run_stages
from pipeline.training.tracking.metrics_log import read_metrics
from tests.stages.small_recipe import QUICKSTART, SMALL, small

STEPS = 200
LONGER = [
    f"training.pretrain.steps={STEPS}",
    "training.pretrain.log_every_steps=7",
    "training.pretrain.checkpoints.every_steps=50",
]


def pretraining(run: Path, data: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "pretrain"]
    places = [f"run={run}", f"dataset.path={data}"]
    return subprocess.Popen(
        [*command, QUICKSTART, *SMALL, *LONGER, *places], stderr=subprocess.PIPE, text=True
    )


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(str(run / "pretrain"))]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a dataset, `data`, and of a run of the command that nobody stopped, `run`."""
    folder = tmp_path_factory.mktemp("unbroken")
    run_stages(small(folder), ["ingest", "extract"], Console(stderr=True, quiet=True))
    process = pretraining(folder / "run", folder / "data")
    process.communicate(timeout=600)
    assert process.returncode == 0
    return folder


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_saves_and_says_so_and_the_same_command_goes_on(
    unbroken: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run, data = tmp_path / "stopped", unbroken / "data"
    first = pretraining(run, data)
    while len(losses(run)) < 3:
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(number)
    _, told = first.communicate(timeout=600)
    assert first.returncode == 143
    (checkpoint,) = (run / "pretrain" / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert 21 <= step < STEPS
    assert (
        f"left a checkpoint at step {step} of {STEPS}; the same command goes on from there"
        in " ".join(told.split())
    )
    second = pretraining(run, data)
    second.communicate(timeout=600)
    assert second.returncode == 0
    assert losses(run) == losses(unbroken / "run")
