"""Two commands in one run folder: real processes, on a disk and in an object store."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from pipeline import storage
from pipeline.cli import BUSY_STATUS
from pipeline.stages.run import run_stages
from pipeline.training.tracking.metrics_log import read_metrics
from tests.processes import DISK_AND_OBJECT_STORE
from tests.stages.small_recipe import QUICKSTART, SMALL, small

STEPS = 60
LONGER = [
    f"training.pretrain.steps={STEPS}",
    "training.pretrain.checkpoints.every_steps=5",
    "training.pretrain.log_every_steps=1",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ingested")
    run_stages(small(folder), ["ingest", "extract"], Console(stderr=True, quiet=True))
    return folder / "data"


def pretraining(run: str, data: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "pretrain"]
    places = [f"run={run}", f"dataset.path={data}"]
    return subprocess.Popen(
        [*command, QUICKSTART, *SMALL, *LONGER, *places, *arguments],
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(params=DISK_AND_OBJECT_STORE)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path / "run")
    else:
        yield f"{request.getfixturevalue('object_store')}/run"


@pytest.mark.processes
def test_a_second_start_is_refused_and_the_first_knows_nothing_of_it(run: str, data: Path) -> None:
    first = pretraining(run, data)
    while not storage.list_names(f"{run}/pretrain/checkpoints"):
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # so that it is at work however long the others take
    for asked in ([], ["training.pretrain.optimizer.learning_rate=0.5", "--restart"]):
        second = pretraining(run, data, *asked)
        _, told = second.communicate(timeout=300)
        assert second.returncode == BUSY_STATUS
        assert f"another command is at work here (process {first.pid} on " in " ".join(told.split())
    first.send_signal(signal.SIGCONT)
    _, told = first.communicate(timeout=600)
    assert first.returncode == 0, told
    lines = read_metrics(f"{run}/pretrain")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    result = json.loads(storage.read_bytes(f"{run}/pretrain/result.json"))["result"]
    assert result["loss"] == lines[-1]["loss"]
    assert [name for name in storage.list_names(run) if "replaced" in name] == []
