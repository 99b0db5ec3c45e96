import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from pipeline.cluster import ClusterConfig
from pipeline.errors import ConfigError, FeatureError, TrainingError
from pipeline.training.assembly import Assembly
from pipeline.training.launch import launch
from pipeline.training.loop import finished_result, request_stop
from pipeline.training.spec import TrainingSpec
from pipeline.training.tracking.metrics_log import read_metrics
from tests.ray_head import RayHead
from tests.training import stand_in
from tests.training.driver import ELASTIC, ELASTIC_STEPS, SEVERAL_NODES, STEPS, world_sizes
from tests.training.stand_in import make_spec, train_on, unhurried, without_dropout
from tests.training.test_loop import curve, events, losses

PROCESS = ClusterConfig(runner="process")
TWO_WORKERS = ClusterConfig(workers=2)
REPOSITORY = Path(__file__).resolve().parents[3]


def wait_until(reached: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps_logged(spec: TrainingSpec) -> int:
    return len(read_metrics(spec.folder))


@pytest.mark.usefixtures("alone")
class TestInThisProcess:
    def test_a_phase_is_trained_and_told_of(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run")
        told: list[dict[str, Any]] = []
        result = launch.launch(spec, PROCESS, told.append, unhurried)
        assert (result.state, result.step) == ("finished", 8)
        assert [line["step"] for line in told if "loss" in line] == list(range(1, 9))
        assert {line["event"] for line in told if "event" in line} == {
            "started",
            "checkpoint",
            "finished",
        }
        assert {line["phase"] for line in told} == {"pretrain"}

    def test_the_best_that_a_device_can_do_is_what_the_cluster_says(self, tmp_path: Path) -> None:
        def counted(spec: TrainingSpec) -> Assembly:
            return replace(stand_in.stand_in(spec), flops=lambda _: 1000)

        cluster = ClusterConfig(runner="process", device_flops=1e6)
        told: list[dict[str, Any]] = []
        launch.launch(make_spec(tmp_path / "run"), cluster, told.append, counted)
        assert all(line["mfu"] > 0 for line in told if "loss" in line)

    def test_a_finished_phase_says_so(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run")
        launch.launch(spec, PROCESS, print, unhurried)
        assert launch.launch(spec, PROCESS, print, unhurried).already_finished
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
        result = launch.launch(spec, PROCESS, print, unhurried)
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


@pytest.mark.parametrize("smallest", [None, 2])
def test_more_workers_than_samples_of_a_step_are_refused_before_anything_starts(
    tmp_path: Path, smallest: int | None
) -> None:
    with pytest.raises(ConfigError, match="leaves some of 9 ranks without a sample"):
        launch.launch(make_spec(tmp_path), ClusterConfig(workers=9, min_workers=smallest), print)
    assert list(tmp_path.iterdir()) == []


def test_what_ends_a_rank_is_told_in_a_sentence_and_the_trace_kept(tmp_path: Path) -> None:
    from ray.exceptions import ActorDiedError, OutOfMemoryError
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
    gone = WorkerGroupError("…", {0: ActorDiedError(), 1: ModuleNotFoundError("No module 'x'")})
    assert str(launch._in_one_sentence(gone, spec)).startswith(
        "pretrain: rank 0: lost, with its node or by itself, and not to be restarted "
        "(cluster.max_failures); start again: it goes on from the last checkpoint; rank 1: No "
        "module 'x' on its node; install Sightline"
    )
    full = launch._in_one_sentence(ControllerError(OutOfMemoryError("Refer to …")), spec)
    assert str(full).startswith("pretrain: the process that leads the ranks: its machine's memory")
    refused = ControllerError(FeatureError("rank 3: no features"))
    assert launch._in_one_sentence(refused, spec) is refused.controller_failure


@pytest.mark.usefixtures("ray_local")
class TestOnRay:
    @pytest.fixture(autouse=True)
    def _stand_ins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launch, "_on_ray_worker", stand_in.ray_worker)

    @pytest.mark.processes
    @pytest.mark.parametrize("victims", [(1,), (0, 1)], ids=["one", "all"])
    def test_a_run_whose_workers_are_killed_ends_as_the_unbroken_one(
        self, victims: tuple[int, ...], unbroken: TrainingSpec, tmp_path: Path
    ) -> None:
        spec = make_spec(tmp_path / "run", steps=STEPS)
        step = random.Random(len(victims)).randint(5, 30)

        def kill() -> None:
            wait_until(lambda: steps_logged(spec) >= step)
            for rank in victims:
                os.kill(int((tmp_path / "run" / f"pid-{rank}").read_text()), signal.SIGKILL)

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

    def test_ranks_of_one_machine_listen_there_only(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run", steps=STEPS)
        found: set[str] = set()

        def look() -> None:
            wait_until(lambda: steps_logged(spec) >= 2)
            for rank in range(2):
                process = psutil.Process(int((tmp_path / "run" / f"pid-{rank}").read_text()))
                connections = process.net_connections("inet")
                listening = [one.laddr.ip for one in connections if one.status == "LISTEN"]
                found.update(address.removeprefix("::ffff:") for address in listening)
            request_stop(spec.folder)

        thread = threading.Thread(target=look)
        thread.start()
        launch.launch(spec, TWO_WORKERS, print)
        thread.join()
        assert found == {"127.0.0.1"}

    def test_its_figures_are_shown_to_prometheus(self, tmp_path: Path) -> None:
        import ray

        launch.launch(make_spec(tmp_path / "birds" / "pretrain"), TWO_WORKERS, print)
        node = ray.nodes()[0]
        page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        shown: list[str] = []

        def look() -> bool:
            with urllib.request.urlopen(page, timeout=10) as answer:
                text = answer.read().decode()
            shown[:] = [line for line in text.splitlines() if 'run="birds"' in line]
            steps = [line for line in shown if line.startswith("ray_sightline_training_step{")]
            return any('phase="pretrain"' in line and line.endswith(" 8.0") for line in steps)

        wait_until(look)  # Ray shows what was told to it every few seconds
        assert len(shown) >= 8


def drive(*arguments: str, environment: Mapping[str, str] = os.environ) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.training.driver", *arguments]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Ray would kill a rank for what other processes of a busy machine take
        env={**environment, "RAY_memory_monitor_refresh_ms": "0"},
    )


def wait_for_step(driver: "subprocess.Popen[str]", spec: TrainingSpec, step: int) -> None:
    wait_until(lambda: steps_logged(spec) >= step or driver.poll() is not None)
    assert driver.poll() is None


def ended(driver: "subprocess.Popen[str]", seconds: float = 600) -> str:
    """Returns the last line that a driver printed; it must have succeeded."""
    try:
        output, said = driver.communicate(timeout=seconds)
    finally:
        driver.kill()
    assert driver.returncode == 0, said
    assert "state-dump" not in said
    return output.splitlines()[-1]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> TrainingSpec:
    spec = make_spec(tmp_path_factory.mktemp("unbroken") / "run", steps=STEPS)
    train_on(2, spec)
    return spec


@pytest.fixture
def own_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What Ray's processes of a test's own cluster know each other by, and nobody else does.

    Ray's `Cluster` writes its address where the whole machine would find it, in a folder that is
    there only if Ray ran before.
    """
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as f:
        (Path(f) / "ray").mkdir()
        monkeypatch.setenv("RAY_TMPDIR", f)
        yield


@pytest.mark.processes
@pytest.mark.slow
def test_a_run_whose_driver_is_killed_is_gone_on_with_by_the_same_command(
    unbroken: TrainingSpec, tmp_path: Path
) -> None:
    spec = make_spec(tmp_path / "run", steps=STEPS)
    step = random.Random(3).randint(10, 30)
    first = drive(spec.folder)
    wait_for_step(first, spec, step)
    first.kill()
    first.wait()
    assert ended(drive(spec.folder)) == "finished"
    assert 0 < events(spec, "resumed")[0]["step"] < STEPS  # ranks outlive their driver a little
    assert curve(spec) == curve(unbroken)


@pytest.mark.processes
@pytest.mark.slow
def test_a_driver_that_is_told_to_stop_leaves_a_checkpoint_and_is_gone_on_with(
    unbroken: TrainingSpec, tmp_path: Path
) -> None:
    spec = make_spec(tmp_path / "run", steps=STEPS)
    step = random.Random(4).randint(10, 30)
    first = drive(spec.folder)
    wait_for_step(first, spec, step)
    first.terminate()
    assert ended(first) == "stopped"
    (stopped,) = events(spec, "stopped")
    assert step <= stopped["step"] < STEPS
    assert ended(drive(spec.folder)) == "finished"
    assert events(spec, "resumed")[0]["step"] == stopped["step"]
    assert curve(spec) == curve(unbroken)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("token", [True, False], ids=["token", "plain"])
def test_a_run_whose_ray_head_is_killed_says_so_and_is_gone_on_with_on_the_next_one(
    unbroken: TrainingSpec, tmp_path: Path, token: bool
) -> None:
    spec = make_spec(tmp_path / "run", steps=STEPS)
    step = random.Random(5).randint(10, 30)
    statuses: list[int] = []
    for _ in range(2):
        head = RayHead(token=token, listens_here_only=True)
        try:
            head.wait()
            driver = drive(spec.folder, head.address, environment=head.environment)
            if not statuses:
                wait_for_step(driver, spec, step)
                head.kill()
            output, said = driver.communicate(timeout=600)
            statuses.append(driver.returncode)
            if len(statuses) == 1:
                assert f"the Ray at {head.address} was lost" in said
                assert "the same command goes on from there" in said
                assert "Traceback" not in said
                assert "state-dump" not in said
        finally:
            head.kill()
    assert statuses[0] == 1
    assert (statuses[1], output.splitlines()[-1]) == (0, "finished")
    assert events(spec, "resumed")[-1]["step"] > 0
    assert curve(spec) == curve(unbroken)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.usefixtures("own_cluster")
def test_a_run_that_loses_a_node_goes_on_with_another(
    unbroken: TrainingSpec, tmp_path: Path
) -> None:
    spec = make_spec(tmp_path / "run", steps=STEPS)
    told = json.loads(ended(drive(spec.folder, SEVERAL_NODES)))
    assert told["states"] == ["finished"]
    assert len(set(told["before"])) == 2
    (resumed,) = events(spec, "resumed")
    assert resumed["world_size"] == 2
    assert curve(spec) == curve(unbroken)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.usefixtures("own_cluster")
def test_a_run_shrinks_when_a_node_is_lost_and_grows_when_one_comes(tmp_path: Path) -> None:
    steady = make_spec(tmp_path / "steady", steps=ELASTIC_STEPS)
    train_on(2, steady, without_dropout)
    spec = make_spec(tmp_path / "run", steps=ELASTIC_STEPS)
    told = json.loads(ended(drive(spec.folder, ELASTIC), seconds=600))
    assert told["states"] == ["finished"]
    assert world_sizes(spec) == [2, 1, 2]
    # no step is repeated for a node that comes
    (stopped,) = events(spec, "stopped")
    assert (
        events(spec, "resumed")[1]["step"] == stopped["step"] > events(spec, "resumed")[0]["step"]
    )
    assert losses(spec) == pytest.approx(losses(steady), abs=1e-5)
    assert [line["step"] for line in read_metrics(spec.folder)] == list(range(1, ELASTIC_STEPS + 1))
