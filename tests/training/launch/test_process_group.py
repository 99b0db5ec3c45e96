import threading
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from pipeline.cluster import ClusterConfig
from pipeline.training.launch.launch import launch
from pipeline.training.stop_request import request_stop
from tests.training.driver import STEPS
from tests.training.stand_in import make_spec, steps_logged, wait_until


@pytest.mark.usefixtures("ray_local", "stand_ins")
def test_ranks_of_one_machine_listen_there_only(tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "run", steps=STEPS)
    found: set[str] = set()

    def listen() -> None:
        wait_until(lambda: steps_logged(spec) >= 2)
        for rank in range(2):
            process = psutil.Process(int((tmp_path / "run" / f"pid-{rank}").read_text()))
            connections = process.net_connections("inet")
            listening = [one.laddr.ip for one in connections if one.status == "LISTEN"]
            found.update(address.removeprefix("::ffff:") for address in listening)
        request_stop(spec.folder)

    thread = threading.Thread(target=listen)
    thread.start()
    launch(spec, ClusterConfig(workers=2), print)
    thread.join()
    assert found == {"127.0.0.1"}
