import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster import ClusterConfig
from pipeline.errors import ConfigError
from pipeline.training.assembly import Assembly
from pipeline.training.launch.launch import launch
from pipeline.training.spec import TrainingSpec
from tests.training import stand_in
from tests.training.stand_in import make_spec, steps_logged, unhurried, wait_until

PROCESS = ClusterConfig(runner="process")


@pytest.mark.usefixtures("alone")
class TestInThisProcess:
    def test_a_phase_is_trained_and_told_of(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run")
        told: list[dict[str, Any]] = []
        result = launch(spec, PROCESS, told.append, unhurried)
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
        launch(make_spec(tmp_path / "run"), cluster, told.append, counted)
        assert all(line["mfu"] > 0 for line in told if "loss" in line)

    def test_a_finished_phase_says_so(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run")
        launch(spec, PROCESS, print, unhurried)
        assert launch(spec, PROCESS, print, unhurried).already_finished
        # before Ray or anything else is started, so any cluster will do
        assert launch(spec, ClusterConfig(address="10.0.0.1:1"), print).already_finished

    def test_sigterm_makes_it_save_and_leave(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run", steps=200)

        def terminate() -> None:
            wait_until(lambda: steps_logged(spec) >= 4)
            os.kill(os.getpid(), signal.SIGTERM)

        before = signal.getsignal(signal.SIGTERM)
        thread = threading.Thread(target=terminate)
        thread.start()
        result = launch(spec, PROCESS, print, unhurried)
        thread.join()
        assert result.state == "stopped"
        assert 4 <= result.step < 200
        assert (tmp_path / "run" / "checkpoints" / f"step-{result.step:08d}").is_dir()
        assert signal.getsignal(signal.SIGTERM) == before
        assert not (tmp_path / "run" / ".stop").exists()


@pytest.mark.parametrize("smallest", [None, 2])
def test_more_workers_than_samples_of_a_step_are_refused_before_anything_starts(
    tmp_path: Path, smallest: int | None
) -> None:
    with pytest.raises(ConfigError, match="leaves some of 9 ranks without a sample"):
        launch(make_spec(tmp_path), ClusterConfig(workers=9, min_workers=smallest), print)
    assert list(tmp_path.iterdir()) == []
