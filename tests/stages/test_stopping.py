"""A command that is told to stop: by a cluster that wants its machine back, or by Ctrl-C."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.stages.run import run_stages
from pipeline.training.metrics_log import read_metrics
from tests.stages.test_run import QUICKSTART, SMALL, small

STEPS = 200
LONGER = [
    f"training.pretrain.steps={STEPS}",
    "training.pretrain.log_every_steps=1",
    "training.pretrain.checkpoint_every_steps=50",
]


def pretraining(run: Path, data: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "pretrain"]
    places = [f"run={run}", f"dataset.path={data}"]
    return subprocess.Popen(
        [*command, QUICKSTART, *SMALL, *LONGER, *places], stderr=subprocess.PIPE, text=True
    )


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(str(run / "pretrain"))]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_saves_and_says_so_and_the_same_command_goes_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    run_stages(small(tmp_path), ["ingest", "extract"], Console(stderr=True, quiet=True))
    run, data = tmp_path / "stopped", tmp_path / "data"
    unbroken = pretraining(tmp_path / "run", data)
    unbroken.communicate(timeout=240)
    assert unbroken.returncode == 0
    first = pretraining(run, data)
    while len(losses(run)) < 20:
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(number)
    _, told = first.communicate(timeout=120)
    assert first.returncode == 143
    assert "the same command goes on from there" in " ".join(told.split())
    assert 20 <= len(losses(run)) < STEPS
    second = pretraining(run, data)
    second.communicate(timeout=240)
    assert second.returncode == 0
    assert losses(run) == losses(tmp_path / "run")
