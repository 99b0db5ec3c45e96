"""The cluster that work runs on: a Ray of our own on this machine, or one that is joined."""

import atexit
import os
import re
import secrets
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from pipeline import ray_2_60
from pipeline.config import Config
from pipeline.errors import ClusterError
from pipeline.scratch import scratch_folder

SECONDS_TO_CONNECT = 5.0

_HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_ADDRESSES = (
    "expected auto, or the host:port that `ray start --head` prints, as 10.0.0.1:6379 (a "
    "dashboard's URL is for `sightline submit --address`), or null for a Ray of this command's own"
)
TOKEN_ADVICE = (
    "give the cluster's token in RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, or in "
    "~/.ray/auth_token"
)

Tell = Callable[[str], None]


class ClusterConfig(Config):
    """Where training runs. With `runner: process` this process is the one rank, without Ray.

    Under torchrun, `runner: process` with `workers` equal to its number of processes makes each
    of them a rank.
    """

    runner: Literal["ray", "process"] = Field(
        default="ray",
        description="ray: ranks are Ray actors; process: this process is the one rank or, under "
        "torchrun, one of `workers`",
    )
    address: str | None = Field(
        default=None,
        description="the Ray cluster; null: one of our own on this machine; auto; or host:port",
    )
    workers: PositiveInt = Field(default=1, description="ranks of training")
    min_workers: PositiveInt | None = Field(
        default=None,
        description="a run starts, and goes on after losing nodes, on as few ranks as these "
        "where there is no room for `workers`, and takes in more when nodes come; null: it "
        "waits for room",
    )
    cpus_per_worker: PositiveInt = Field(
        default=1, description="CPUs that a rank asks the cluster for"
    )
    gpus_per_worker: int = Field(
        default=0, ge=0, le=1, description="GPUs that a rank asks the cluster for"
    )
    max_failures: int = Field(
        default=3, ge=0, description="restarts after a lost worker, per launch"
    )
    device_flops: PositiveFloat | None = Field(
        default=None,
        description="operations that a worker's device can make in a second at best, in the "
        "precision that is trained in: what MFU is a share of; null: those of a GPU that is "
        "known",
    )

    @field_validator("address")
    @classmethod
    def _can_be_joined(cls, address: str | None) -> str | None:
        if address in (None, "auto") or _HOST_AND_PORT.fullmatch(address):
            return address
        raise ValueError(_ADDRESSES)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.runner == "process" and self.address is not None:
            raise ValueError(f"runner=process runs here and has no use for address={self.address}")
        if self.runner == "process" and self.min_workers is not None:
            raise ValueError("runner=process loses and gains no nodes; leave min_workers out")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is more than workers={self.workers}")
        return self

    def each_worker(self) -> dict[str, float]:
        """Returns what a rank asks the cluster for."""
        return {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}

    def world_sizes(self) -> range:
        """Returns the numbers of ranks that a run may have."""
        return range(self.min_workers or self.workers, self.workers + 1)


@dataclass
class Connection:
    """What this process is connected to, and how its user is told of it."""

    address: str  # empty for one of our own
    tell: Tell
    silent_since: float | None = None  # by time.monotonic; its head does not answer


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


connection = Connection("", _print)


def start_ray(cluster: ClusterConfig) -> None:
    """Connects this process to Ray, starting one on this machine if the config asks for it.

    Does nothing if Ray is connected already, so all stages of a command share one. Ours listens
    with a token, has no dashboard, and ends with this process. A cluster that is joined may want
    a token, or none. What is to be said of it later goes to `connection.tell`. Raises ClusterError
    if there is no Ray at the address, or it does not let us in.
    """
    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    if "ray" in sys.modules:
        import ray

        if ray.is_initialized():
            if cluster.address is not None:
                connection.address = str(ray.get_runtime_context().gcs_address)
            return
    if cluster.address is None:
        _start(cluster.workers * cluster.cpus_per_worker)
        connection.address = ""
    else:
        connection.address = _join(cluster.address)


def resources(cluster: ClusterConfig) -> dict[str, float]:
    """Returns what the cluster has now, as `CPU` and `GPU`; starts or joins it."""
    start_ray(cluster)
    import ray

    found: dict[str, float] = ray.cluster_resources()
    return found


def token() -> str:
    """Returns the token that Ray's clients send, or an empty string if there is none.

    Raises ClusterError if one is promised that cannot be read.
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode == "disabled":
        return ""
    found = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if found:
        return found
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(given or "~/.ray/auth_token").expanduser()
    try:
        found = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        if given:
            raise ClusterError(
                f"RAY_AUTH_TOKEN_PATH: {path} cannot be read ({error}); {TOKEN_ADVICE}"
            ) from error
    if not found and given:
        raise ClusterError(f"RAY_AUTH_TOKEN_PATH: {path} is empty; {TOKEN_ADVICE}")
    if not found and mode == "token":
        raise ClusterError(f"RAY_AUTH_MODE is token, and there is no token; {TOKEN_ADVICE}")
    return found


def search_path() -> list[str]:
    """Returns the folders in which workers look for modules before their own.

    They are those that this process has and a worker would not know: the one of a Sightline that
    is not installed, and the working folder, if this process looks there itself. Ray would give
    workers the working folder always, so that a `pipeline.py` or a `queue.py` in it would take
    the place of what they import.
    """
    here = Path.cwd()
    package = Path(__file__).resolve().parents[1]
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    folders = [] if package in installed else [package]
    if any(Path(entry).absolute() == here for entry in sys.path) and here not in folders:
        folders.append(here)
    return [str(folder) for folder in folders]


_RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray polls its ranks every two seconds; a start and an end wait for a few such polls.
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


def _start(num_cpus: int) -> None:
    """Starts a Ray of our own on this machine."""
    for name, value in _LOCAL_RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    folder = scratch_folder()
    if os.environ.get("RAY_AUTH_MODE") != "disabled":
        _make_token(folder)
        token()
        use_token()
    import ray

    _tell_in_a_sentence()
    try:
        ray_2_60.init_on_loopback(
            folder,
            only_here=os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0",
            # Without it, init joins any cluster that happens to run on this machine.
            address="local",
            num_cpus=max(os.cpu_count() or 1, num_cpus),
            include_dashboard=False,
            logging_level="error",
            log_to_driver=False,
            job_config=ray_2_60.job_config(search_path()),
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"a Ray of this command's own does not start ({_first_line(error)}); `cluster.runner="
            "process` does without"
        ) from error
    atexit.register(ray.shutdown)  # before its folder is removed


def _make_token(folder: Path) -> None:
    """Gives a cluster of our own its own token, readable by this user only."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = folder / "auth_token"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(descriptor, secrets.token_hex(32).encode())
    os.close(descriptor)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)


def use_token() -> None:
    """Makes this process and those that it starts send the token."""
    os.environ["RAY_AUTH_MODE"] = "token"
    if "ray" in sys.modules:
        ray_2_60.read_environment_again()


def _tell_in_a_sentence() -> None:
    """Has what Ray tells a driver of its nodes said shortly, and once; logs have the rest."""
    told: set[str] = set()

    def tell(lines: Sequence[str], logs: Path) -> None:
        line = next(iter("".join(lines).strip().splitlines()), "")
        if "Raylet is terminated" in line:
            line = "a node of the cluster was lost; work of its processes is done again elsewhere"
        if line and line not in told:
            told.add(line)
            connection.tell(f"{line} (Ray's logs: {logs})")

    ray_2_60.print_through(tell)


def _join(address: str) -> str:
    """Connects to a cluster that others have started, and returns its address."""
    where = _address_of_auto() if address == "auto" else address
    if token():
        use_token()  # a cluster that wants none takes no notice
    deadline = time.monotonic() + SECONDS_TO_CONNECT
    is_node = _is_node(where)
    while not is_node and time.monotonic() < deadline:  # one that starts just now
        time.sleep(0.5)
        is_node = _is_node(where)
    import ray

    if not is_node:
        raise ClusterError(
            f"cluster.address: this machine is no node of the cluster at {where}, and a run starts "
            f"on one; join it with `ray start --address={where}`, or send the recipe there with "
            "`sightline submit --address` and the dashboard's URL"
        )
    _tell_in_a_sentence()
    try:
        ray.init(
            address=where,
            logging_level="error",
            log_to_driver=False,
            job_config=ray_2_60.job_config(search_path()),
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(f"cluster.address: cannot join {where}: {_first_line(error)}") from error
    return where


def _address_of_auto() -> str:
    """Returns what RAY_ADDRESS says, or else the address of the Ray that runs on this machine."""
    found = os.environ.get("RAY_ADDRESS", "")
    if found and found != "auto":
        if not _HOST_AND_PORT.fullmatch(found):
            raise ClusterError(f"cluster.address=auto takes RAY_ADDRESS={found!r}; {_ADDRESSES}")
        return found
    running, current = ray_2_60.addresses_on_this_machine()
    if current in running:
        return str(current)
    if len(running) > 1:
        raise ClusterError(
            f"cluster.address=auto: several Rays run on this machine, at {', '.join(running)}; "
            "give one of these as cluster.address"
        )
    if not running:
        raise ClusterError(
            "cluster.address=auto: no Ray runs on this machine; start one with `ray start --head`, "
            "or leave the address out for one of this command's own"
        )
    return running[0]


def _is_node(where: str) -> bool:
    """Tells whether this machine is a node of the cluster at an address."""
    return bool(probe(where) & ray_2_60.nodes_on_this_machine())


def probe(where: str) -> set[str]:
    """Returns the ids of the living nodes of the cluster at an address.

    Raises ClusterError, in seconds, if there is none that lets this process in.
    """
    import grpc
    import ray

    try:
        version, nodes = ray_2_60.ask_head(where, SECONDS_TO_CONNECT)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            sent = "does not take the token it was given" if token() else "wants a token"
            raise ClusterError(
                f"cluster.address: the Ray at {where} {sent}; {TOKEN_ADVICE}"
            ) from error
        reason = str(error.details()).rpartition("last error: ")[2]
        if "http1" in reason:
            raise ClusterError(
                f"cluster.address: what answers at {where} is a web page, as a dashboard's; "
                "give the port that `ray start --head` prints, which is 6379 unless chosen"
            ) from error
        raise ClusterError(
            f"cluster.address: no Ray answers at {where} ({reason}); start one with "
            "`ray start --head`, or leave the address out"
        ) from error
    if version != ray.__version__:
        raise ClusterError(
            f"cluster.address: the cluster at {where} has Ray {version}, and this "
            f"process has {ray.__version__}; they must be equal"
        )
    return nodes


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
