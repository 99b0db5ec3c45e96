"""Drivers of their own, to be killed: each trains the stand-in in a folder with two Ray workers.

Run by test_launch: `python -m tests.training.driver FOLDER [ADDRESS]`. With `several-nodes` for
the address it makes a cluster of three nodes, and kills one of the two that train. With `elastic`
it makes one of two nodes, kills one while both train, and later adds another.
"""

import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline.cluster import ClusterConfig, start_ray
from pipeline.errors import PipelineError
from pipeline.training.assembly import Assembly
from pipeline.training.launch import ray_train
from pipeline.training.launch.launch import launch
from pipeline.training.launch.phases import Assembled
from pipeline.training.spec import TrainingSpec
from pipeline.training.tracking.metrics_log import read_metrics
from tests.training.stand_in import leave_pid, make_spec, ray_worker, stand_in, without_dropout

STEPS = 100  # of a twentieth of a second and more: time to be killed in the middle
SEVERAL_NODES = "several-nodes"
ELASTIC = "elastic"
HURRY = "hurry"  # a file in the run's folder
ELASTIC_STEPS = 150  # more seconds than the cluster takes to change


def main(folder: str, address: str | None = None) -> None:
    spec = make_spec(folder, steps=STEPS)
    if address == SEVERAL_NODES:
        train_and_lose_a_node(spec)
        return
    if address == ELASTIC:
        train_while_nodes_go_and_come(make_spec(folder, steps=ELASTIC_STEPS))
        return
    ray_train._on_ray_worker = ray_worker
    cluster = ClusterConfig(workers=2, address=address)
    try:
        print(launch(spec, cluster, print).state)
    except PipelineError as error:
        sys.exit(str(error))


def unhurried(spec: TrainingSpec) -> Assembly:
    """The stand-in, slow enough to be interrupted; a rank leaves its process's number."""
    torch.set_num_threads(1)

    def on_step(_: int, rank: int) -> None:
        leave_pid(spec, rank)
        time.sleep(0.05)

    return stand_in(spec, on_step)


def train_and_lose_a_node(spec: TrainingSpec) -> None:
    """Prints how the run ended, the nodes that ranks were on, and the one that was lost."""
    with nodes_of_one_rank(3) as (cluster, nodes):
        config = ClusterConfig(workers=2, address=cluster.address)
        training = Training(spec, config, unhurried)
        training.wait_for(lambda: len(read_metrics(spec.folder)) >= 14)
        before = [node_of(spec, rank, nodes) for rank in range(2)]
        lost = before[1]
        cluster.remove_node(nodes[lost], allow_graceful=False)
        print(json.dumps({"states": training.ended(), "before": before, "lost": lost}))


def train_while_nodes_go_and_come(spec: TrainingSpec) -> None:
    """Prints how the run ended, and the seconds that it took to go on without and with a node."""
    ray_train.SECONDS_BETWEEN_RESIZES = 2.0
    with nodes_of_one_rank(2) as (cluster, nodes):
        config = ClusterConfig(workers=2, min_workers=1, address=cluster.address)
        training = Training(spec, config, waiting_for_nodes)
        training.wait_for(lambda: len(read_metrics(spec.folder)) >= 4)
        cluster.remove_node(nodes[node_of(spec, 1, nodes)], allow_graceful=False)
        seconds = [training.wait_for(lambda: world_sizes(spec) == [2, 1])]
        cluster.add_node(num_cpus=1)
        seconds.append(training.wait_for(lambda: world_sizes(spec) == [2, 1, 2]))
        (Path(spec.folder) / HURRY).touch()
        print(json.dumps({"states": training.ended(), "seconds": seconds}))


def waiting_for_nodes(spec: TrainingSpec) -> Assembly:
    """The stand-in, whose loss knows no world size; slow until it is told to hurry."""
    torch.set_num_threads(1)

    def on_step(_: int, rank: int) -> None:
        leave_pid(spec, rank)
        if not (Path(spec.folder) / HURRY).exists():
            time.sleep(1.0)

    return without_dropout(spec, on_step)


def world_sizes(spec: TrainingSpec) -> list[int]:
    """Returns the number of ranks of each start so far."""
    events = (Path(spec.folder) / "events.jsonl").read_text().splitlines()
    starts = (json.loads(line) for line in events if line.endswith("}"))
    return [line["world_size"] for line in starts if line["event"] in ("started", "resumed")]


class Training:
    """A run in a thread beside those who change its cluster."""

    def __init__(self, spec: TrainingSpec, config: ClusterConfig, assembled: Assembled) -> None:
        self._states: list[str] = []

        def train() -> None:
            result = launch(spec, config, lambda _: None, assembled)
            self._states.append(result.state)

        self._thread = threading.Thread(target=train)
        self._thread.start()

    def wait_for(self, reached: Any) -> float:
        """Returns the seconds until it was reached; AssertionError if the run ends before."""
        began = time.monotonic()
        while not reached():
            assert self._thread.is_alive(), "the run has ended"
            time.sleep(0.05)
        return round(time.monotonic() - began, 1)

    def ended(self) -> list[str]:
        """Returns how the run ended, once it has: nothing if it failed."""
        self._thread.join()
        return self._states


@contextmanager
def nodes_of_one_rank(count: int) -> Iterator[tuple[Any, list[Any]]]:
    """Yields a cluster to which this process is connected, and its nodes but the head."""
    import ray
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="sl-", dir="/tmp", ignore_cleanup_errors=True) as temp:
        head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": temp}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        nodes = [cluster.add_node(num_cpus=1) for _ in range(count)]
        start_ray(ClusterConfig(address=cluster.address))
        yield cluster, nodes
        ray.shutdown()
        cluster.shutdown()


def node_of(spec: TrainingSpec, rank: int, nodes: list[Any]) -> int:
    """Returns which of the nodes a rank's process belongs to."""
    pid = int((Path(spec.folder) / f"pid-{rank}").read_text())
    raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
    parent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]
    return raylets.index(int(parent))


if __name__ == "__main__":
    main(*sys.argv[1:])
