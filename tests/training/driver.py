"""Drivers of their own, to be killed: each trains the stand-in in a folder with two Ray workers.

Run by test_launch: `python -m tests.training.driver FOLDER [ADDRESS]`. With `several-nodes` for
the address it makes a cluster of three nodes, and kills one of the two that train.
"""

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from pipeline.training import launch
from pipeline.training.assembly import Assembly
from pipeline.training.metrics_log import read_metrics
from pipeline.training.spec import TrainingSpec
from tests.training.stand_in import make_spec, ray_worker, stand_in

STEPS = 100  # of a twentieth of a second and more: time to be killed in the middle
SEVERAL_NODES = "several-nodes"


def main(folder: str, address: str | None = None) -> None:
    spec = make_spec(folder, steps=STEPS)
    if address == SEVERAL_NODES:
        train_and_lose_a_node(spec)
        return
    launch._on_ray_worker = ray_worker
    cluster = launch.ClusterConfig(workers=2, address=address)
    print(launch.launch(spec, cluster, print).state)


def unhurried(spec: TrainingSpec) -> Assembly:
    """The stand-in, slow enough to be interrupted; a rank leaves its process's number."""
    torch.set_num_threads(1)

    def on_step(_: int, rank: int) -> None:
        written = Path(spec.folder) / f"pid-{rank}.new"
        written.write_text(str(os.getpid()))
        written.replace(written.with_suffix(""))  # whole, whenever it is read
        time.sleep(0.05)

    return stand_in(spec, on_step)


def train_and_lose_a_node(spec: TrainingSpec) -> None:
    """Prints how the run ended, the nodes that ranks were on, and the one that was lost."""
    import ray
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="sl-", dir="/tmp", ignore_cleanup_errors=True) as temp:
        head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": temp}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        states: list[str] = []

        def train() -> None:
            config = launch.ClusterConfig(workers=2, address=cluster.address)
            states.append(launch.launch(spec, config, lambda _: None, unhurried).state)

        def node_of(rank: int) -> int:
            pid = int((Path(spec.folder) / f"pid-{rank}").read_text())
            raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
            parent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]
            return raylets.index(int(parent))

        thread = threading.Thread(target=train)
        thread.start()
        while len(read_metrics(spec.folder)) < 14:
            time.sleep(0.05)
        before = [node_of(rank) for rank in range(2)]
        lost = before[1]
        cluster.remove_node(nodes[lost], allow_graceful=False)
        thread.join()
        print(json.dumps({"states": states, "before": before, "lost": lost}))
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
