"""The cluster that work runs on: a Ray of our own on this machine, or one that is joined."""

import atexit
import os
import secrets
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipeline.config import Config
from pipeline.errors import TrainingError

SECONDS_TO_CONNECT = 5.0


class ClusterConfig(Config):
    """Where training runs. With `runner: process` this process is the one rank, without Ray.

    Under torchrun, `runner: process` with `workers` equal to its number of processes makes each
    of them a rank.
    """

    runner: Literal["ray", "process"] = "ray"
    address: str | None = None  # null: a Ray of our own on this machine; auto; or host:port
    workers: PositiveInt = 1  # ranks
    # A run starts, and goes on after losing nodes, on as few ranks as these where there is no room
    # for `workers`, and takes in more when nodes come; null: it waits for room.
    min_workers: PositiveInt | None = None
    cpus_per_worker: PositiveInt = 1
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    max_failures: int = Field(default=3, ge=0)  # restarts after a lost worker, per launch
    # Operations that a worker's device can make in a second at best, in the precision that is
    # trained in: what MFU is a share of. Null: those of a GPU that is known.
    device_flops: PositiveFloat | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.runner == "process" and self.address is not None:
            raise ValueError(f"runner=process runs here and has no use for address={self.address}")
        if self.runner == "process" and self.min_workers is not None:
            raise ValueError("runner=process loses and gains no nodes; leave min_workers out")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is more than workers={self.workers}")
        return self

    def world_sizes(self) -> range:
        """Returns the numbers of ranks that a run may have."""
        return range(self.min_workers or self.workers, self.workers + 1)


def start_ray(cluster: ClusterConfig) -> None:
    """Connects this process to Ray, starting one on this machine if the config asks for it.

    Does nothing if Ray is connected already, so all stages of a command share one. Ours listens
    with a token, has no dashboard, and ends with this process. Raises TrainingError if there is
    no Ray at the address.
    """
    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    if cluster.address is None:
        for name, value in _LOCAL_RAY_SETTINGS.items():
            os.environ.setdefault(name, value)
    if "ray" not in sys.modules:  # read once, at import; a local Ray then turns it on by itself
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    if ray.is_initialized():
        return
    if cluster.address is not None:
        _connect(cluster.address)
        return
    folder = tempfile.mkdtemp(prefix="sl-", dir="/tmp")  # short: it becomes part of socket paths
    _make_token(Path(folder))
    ray.init(
        # Without it, init joins any cluster that happens to run on this machine.
        address="local",
        num_cpus=max(os.cpu_count() or 1, cluster.workers * cluster.cpus_per_worker),
        include_dashboard=False,
        logging_level="error",
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=folder,
    )
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def resources(cluster: ClusterConfig) -> dict[str, float]:
    """Returns what the cluster has now, as `CPU` and `GPU`; starts or joins it."""
    start_ray(cluster)
    import ray

    found: dict[str, float] = ray.cluster_resources()
    return found


_RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray looks at its ranks every two seconds; a start and an end wait for a few such looks.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
_LOCAL_RAY_SETTINGS = {
    # With 127.0.0.1 as the node's address, it makes every one of Ray's sockets listen there only.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # One process less to start: this machine is not one that a cloud takes back node by node.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Workers that Ray starts ahead of need are none that ranks could be: these have an environment.
    "RAY_prestart_worker_first_driver": "0",
}


def _make_token(folder: Path) -> None:
    """Gives a cluster of our own its own token, readable by this user only."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    path = folder / "auth_token"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(descriptor, secrets.token_hex(32).encode())
    os.close(descriptor)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)


def _connect(address: str) -> None:
    import ray

    found = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    host, _, port = found.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        # Ray itself waits for a dead address for ten minutes and more.
        try:
            socket.create_connection((host, int(port)), SECONDS_TO_CONNECT).close()
        except OSError as error:
            raise TrainingError(
                f"cluster.address: no Ray answers at {found} ({error}); start one with "
                "`ray start --head`, or leave the address out"
            ) from error
    try:
        ray.init(address=address, logging_level="error", log_to_driver=False)
    except (ConnectionError, RuntimeError) as error:
        raise TrainingError(f"cluster.address: cannot join {found}: {error}") from error
