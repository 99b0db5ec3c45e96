import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.errors import ConfigError, FeatureError, TrainingError
from pipeline.training import launch
from pipeline.training.launch import ClusterConfig
from pipeline.training.loop import finished_result, train
from pipeline.training.metrics_log import read_metrics
from pipeline.training.spec import Environment, TrainingResult, TrainingSpec
from tests.training import stand_in
from tests.training.stand_in import make_spec, train_on
from tests.training.test_loop import curve, events

PROCESS = ClusterConfig(runner="process")
TWO_WORKERS = ClusterConfig(workers=2)
REPOSITORY = Path(__file__).resolve().parents[2]


def wait_until(reached: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps_logged(spec: TrainingSpec) -> int:
    return len(read_metrics(spec.folder))


def train_stand_ins(specs: Sequence[TrainingSpec], here: Environment) -> list[TrainingResult]:
    return [train(spec, here, stand_in.unhurried) for spec in specs]


@pytest.mark.usefixtures("alone")
class TestInThisProcess:
    @pytest.fixture(autouse=True)
    def _stand_ins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launch, "_train_each", train_stand_ins)

    def test_a_phase_is_trained_and_told_of(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run")
        told: list[dict[str, Any]] = []
        result = launch.launch(spec, PROCESS, told.append)
        assert (result.state, result.step) == ("finished", 8)
        assert [line["step"] for line in told if "loss" in line] == list(range(1, 9))
        assert {line["event"] for line in told if "event" in line} == {
            "started",
            "checkpoint",
            "finished",
        }
        assert {line["phase"] for line in told} == {"pretrain"}

    def test_a_finished_phase_says_so(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run")
        launch.launch(spec, PROCESS, print)
        assert launch.launch(spec, PROCESS, print).already_finished
        # before Ray or anything else is started, so any cluster will do
        assert launch.launch(spec, ClusterConfig(address="10.0.0.1:1"), print).already_finished

    def test_sigterm_makes_it_save_and_leave(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run", steps=200)

        def terminate() -> None:
            wait_until(lambda: steps_logged(spec) >= 4)
            os.kill(os.getpid(), signal.SIGTERM)

        before = signal.getsignal(signal.SIGTERM)
        thread = threading.Thread(target=terminate)
        thread.start()
        result = launch.launch(spec, PROCESS, print)
        thread.join()
        assert result.state == "stopped"
        assert 4 <= result.step < 200
        assert (tmp_path / "run" / "checkpoints" / f"step-{result.step:08d}").is_dir()
        assert signal.getsignal(signal.SIGTERM) == before
        assert not (tmp_path / "run" / ".stop").exists()


def test_more_workers_than_processes_are_refused(tmp_path: Path) -> None:
    cluster = ClusterConfig(runner="process", workers=2)
    with pytest.raises(ConfigError, match=r"cluster.workers: found 2, but .* has 1 process"):
        launch.launch(make_spec(tmp_path), cluster, print)


def test_a_batch_that_the_workers_cannot_share_is_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="not a positive multiple"):
        launch.launch(make_spec(tmp_path), ClusterConfig(workers=3), print)
    assert list(tmp_path.iterdir()) == []


def test_an_address_has_no_use_in_one_process() -> None:
    with pytest.raises(ConfigError, match="no use for address"):
        config.check(ClusterConfig, {"runner": "process", "address": "auto"}, "cluster")


def test_an_address_where_no_ray_answers_is_named_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(TrainingError, match=f"no Ray answers at 127.0.0.1:{port}"):
        launch.start_ray(ClusterConfig(address=f"127.0.0.1:{port}"))


def test_what_ends_a_rank_is_told_in_a_sentence_and_the_trace_kept(tmp_path: Path) -> None:
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    spec = make_spec(tmp_path / "run")
    lost = WorkerGroupError("a trace\nof many lines", {1: KeyError("bird"), 0: OSError("gone")})
    told = launch._in_one_sentence(lost, spec)
    trace = tmp_path / "run" / "failure.txt"
    assert isinstance(told, TrainingError)
    assert str(told).startswith("pretrain: rank 0: OSError: gone; rank 1: KeyError: 'bird'; ")
    assert str(told).endswith(str(trace))
    assert "of many lines" in trace.read_text()
    ours = WorkerGroupError("…", {0: ConnectionError("closed"), 1: FeatureError("no features")})
    assert str(launch._in_one_sentence(ours, spec)) == "rank 1: no features"
    refused = ControllerError(FeatureError("rank 3: no features"))
    assert launch._in_one_sentence(refused, spec) is refused.controller_failure


@pytest.mark.usefixtures("ray_local")
class TestOnRay:
    @pytest.fixture(autouse=True)
    def _stand_ins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launch, "_on_ray_worker", stand_in.ray_worker)

    def test_a_run_whose_worker_is_killed_ends_as_the_unbroken_one(self, tmp_path: Path) -> None:
        unbroken = make_spec(tmp_path / "unbroken", steps=30)
        train_on(2, unbroken)
        spec = make_spec(tmp_path / "run", steps=30)

        def kill() -> None:
            wait_until(lambda: steps_logged(spec) >= 11)
            os.kill(int((tmp_path / "run" / "pid-1").read_text()), signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        result = launch.launch(spec, TWO_WORKERS, print)
        thread.join()
        assert (result.state, result.already_finished) == ("finished", False)
        assert len(events(spec, "resumed")) == 1
        assert curve(spec) == curve(unbroken)

    def test_phases_share_ranks_and_an_error_on_one_is_a_sentence_and_no_restart(
        self, tmp_path: Path
    ) -> None:
        good, bad = make_spec(tmp_path / "good"), make_spec(tmp_path / "bad")
        bad = bad.model_copy(update={"phase": "fails"})
        with pytest.raises(FeatureError) as failure:
            launch.launch_all([good, bad], TWO_WORKERS, print)
        assert str(failure.value) == "rank 1: shard 7 has no features"
        assert finished_result(good) is not None
        assert len(events(bad, "started")) == 1
        assert not (tmp_path / "good" / "ray").exists()


@pytest.mark.slow
def test_a_run_whose_driver_is_killed_is_gone_on_with_by_the_same_command(tmp_path: Path) -> None:
    unbroken, spec = (make_spec(tmp_path / name, steps=40) for name in ("unbroken", "run"))
    train_on(2, unbroken)
    command = [sys.executable, "-m", "tests.training.driver", spec.folder]
    first = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    wait_until(lambda: steps_logged(spec) >= 14)
    first.kill()
    first.wait()
    second = subprocess.run(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True, timeout=200
    )
    assert second.stdout.splitlines()[-1] == "finished"
    assert events(spec, "resumed")[0]["step"] >= 12
    assert curve(spec) == curve(unbroken)
