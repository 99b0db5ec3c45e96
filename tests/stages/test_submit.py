"""A recipe as a job on a real Ray head: its log, its exit status, its absence."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import config
from pipeline.cli import run_job
from pipeline.errors import ConfigError, StageError
from pipeline.recipe import Recipe
from pipeline.stages.submit import JobClient, job_name

QUICKSTART = str(Path(__file__).resolve().parents[2] / "jobs" / "recipes" / "quickstart.yaml")
START_SECONDS = 120


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The dashboard address of a Ray head of our own, which ends with the module."""
    folder = tempfile.mkdtemp(prefix="sl-", dir="/tmp")
    port, dashboard, agent = free_port(), free_port(), free_port()
    address = f"http://127.0.0.1:{dashboard}"
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        f"--port={port}",
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
        "--ray-client-server-port=" + str(free_port()),
        f"--temp-dir={folder}",
    ]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    with Path(folder, "head.log").open("wb") as log:
        started = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/version", timeout=2).close()
                break
            except OSError:
                assert started.poll() is None, Path(folder, "head.log").read_text()
                assert time.monotonic() < deadline, "the head did not come up"
                time.sleep(0.5)
        yield address
    finally:
        started.terminate()
        started.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of these tests listens on this machine only and wants no token."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


@pytest.mark.slow
def test_a_job_does_what_the_command_does_and_its_status_is_ours(
    head: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    places = [f"run={tmp_path / 'run'}", f"dataset.path={tmp_path / 'data'}"]
    small = ["dataset.source.scenes=20", "dataset.source.validation_scenes=8"]
    tiny = [
        f"training.{phase}.{setting}"
        for phase in ("pretrain", "finetune")
        for setting in ("steps=2", "global_batch_size=8", "micro_batch_size=8", "warmup_steps=1")
    ]
    overrides = [*places, *small, *tiny, "training.blind_twin=false", "cluster.workers=1"]
    assert run_job(["submit", QUICKSTART, *overrides, "--address", head]) == 0
    said = capfd.readouterr().err
    assert "evaluate" in said
    assert (tmp_path / "run" / "report.html").exists()

    missing = f"model.initial={tmp_path / 'gone'}"
    assert run_job(["submit", QUICKSTART, *overrides, missing, "--address", head]) == 64
    assert "model.initial" in capfd.readouterr().err


@pytest.mark.slow
def test_a_name_in_use_and_an_unknown_job_are_refused(head: str, tmp_path: Path) -> None:
    client = JobClient(head)
    with pytest.raises(StageError, match="knows no job 'nosuch'"):
        client.status("nosuch")
    recipe = config.load(Recipe, QUICKSTART, [f"run={tmp_path}/r", f"dataset.path={tmp_path}/d"])
    job = client.submit(recipe, job_name("twice"))
    with pytest.raises(StageError, match="exists at"):
        client.submit(recipe, job)
    client.stop(job)
    assert client.follow(job) == 143


def test_no_cluster_at_an_address_is_said_at_once() -> None:
    with pytest.raises(StageError, match="no Ray cluster answers"):
        JobClient(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match="--address"):
        JobClient("127.0.0.1:8265")
