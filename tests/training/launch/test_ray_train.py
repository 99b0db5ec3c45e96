import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from pipeline.cluster import ClusterConfig
from pipeline.errors import FeatureError
from pipeline.training.launch.launch import launch, launch_all
from pipeline.training.result import finished_result
from pipeline.training.spec import TrainingSpec
from pipeline.training.tracking.metrics_log import read_metrics
from tests.ray_head import RayHead
from tests.training.driver import ELASTIC, ELASTIC_STEPS, SEVERAL_NODES, STEPS, world_sizes
from tests.training.stand_in import (
    make_spec,
    steps_logged,
    train_on,
    wait_until,
    without_dropout,
)
from tests.training.test_loop import curve, events, losses

TWO_WORKERS = ClusterConfig(workers=2)
REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.usefixtures("ray_local", "stand_ins")
class TestOnRay:
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
        result = launch(spec, TWO_WORKERS, print)
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
            launch_all([good, bad], TWO_WORKERS, print)
        assert str(failure.value) == "rank 1: shard 7 has no features"
        assert finished_result(good) is not None
        assert len(events(bad, "started")) == 1
        assert not (tmp_path / "good" / "ray").exists()


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
