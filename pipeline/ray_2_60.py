"""Ray 2.60's private hooks: each is what this release of Ray has no public way for.

No other module reaches into Ray. With another release of Ray each of them must be read anew, which
`tests/test_ray_2_60.py` asks for.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

VERSION = "2.60.0"


def read_environment_again() -> None:
    """Has a Ray that is imported already notice a token in the environment.

    Ray reads RAY_AUTH_MODE once, when its core is loaded.
    """
    from ray._raylet import Config as RayConfig  # type: ignore[attr-defined]

    RayConfig.initialize("")


def init_on_loopback(folder: Path, only_here: bool, **settings: Any) -> None:
    """Starts a Ray in `folder` whose sockets, if `only_here`, all listen on 127.0.0.1.

    `ray.init` has public arguments for neither, and whether Ray may leave 127.0.0.1 it reads from
    the environment once, when it is imported.
    """
    import ray
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = not only_here
    ray.init(_node_ip_address="127.0.0.1", _temp_dir=str(folder), **settings)


def job_config(search_path: Sequence[str]) -> Any:
    """Returns a driver's settings with which workers look for modules in these folders first.

    Ray would put its working folder, and that of the script, before all others by itself.
    """
    import ray

    class SearchPath(list[str]):
        def extend(self, _folders: object) -> None:
            """Leaves out what Ray adds."""

    settings = ray.job_config.JobConfig()
    settings._py_driver_sys_path = SearchPath(reversed(search_path))  # each is put before all
    return settings


def print_through(tell: Callable[[Sequence[str], Path], None]) -> None:
    """Has what Ray would print of its nodes told: the lines, and the folder of Ray's logs.

    By itself it prints, for each node that is lost, the end of a log with tables of its state.
    """
    from ray._private import worker

    def printed(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:  # noqa: ARG001
        tell(data["lines"], Path(worker._global_node.get_logs_dir_path()))

    worker.print_to_stdstream = printed


def addresses_on_this_machine() -> tuple[list[str], str | None]:
    """Returns the addresses of the Rays that run here, and the one that was started last.

    Publicly `ray.init("auto")` takes one, and does not tell that there are several.
    """
    from ray._private import services

    services.find_gcs_addresses.cache_clear()
    return sorted(services.find_gcs_addresses()), services.find_bootstrap_address(None)


def nodes_on_this_machine() -> set[str]:
    """Returns the ids of the nodes of any cluster that this machine is. `ray.nodes` must join."""
    from ray._private.services import find_node_ids

    return set(find_node_ids())


def ask_head(where: str, timeout: float) -> tuple[str, set[str]]:
    """Returns the version of the cluster at an address, and the ids of its living nodes.

    Raises grpc.RpcError within `timeout` seconds. Ray itself waits ten minutes for a dead address,
    and prints a line a second for a wrong token.
    """
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    with init_grpc_channel(where, [("grpc.enable_http_proxy", 0)]) as channel:
        head = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        alive = head.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=timeout)
        known = head.GetAllNodeInfo(gcs_service_pb2.GetAllNodeInfoRequest(), timeout=timeout)
    return alive.ray_version, {
        node.node_id.hex() for node in known.node_info_list if node.state == 0
    }


def trainer_without_needless_actors(is_own_cluster: bool) -> Any:
    """Returns Ray's TorchTrainer without actors of no use here: each takes seconds to start."""
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )

    needless: tuple[type, ...] = (DatasetsCallback,)  # Ray's own datasets: there are none
    if is_own_cluster:  # reservations of a controller that died: so did its Ray
        needless += (PlacementGroupCleanerCallback,)

    class Trainer(TorchTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [one for one in callbacks if not isinstance(one, needless)]

    return Trainer


def group_config(
    backend: str,
    timeout_seconds: int,
    open_store: Callable[[int, int], tuple[str, int]],
    join_group: Callable[[str, int, int, str, int, int], None],
) -> Any:
    """Returns how ranks become a process group: through a store that rank 0 opens.

    `open_store` maps (world size, seconds) to its host and port, on rank 0; `join_group` takes
    (backend, rank, world size, host, port, seconds), on each. Ray would have ranks use torch's
    own store, which listens on every interface of its machine.
    """
    import ray
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

    class Backend(_TorchBackend):  # type: ignore[misc]
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            world_size, seconds = len(worker_group), backend_config.timeout_s
            host, port = worker_group.execute_single(0, open_store, world_size, seconds)
            worker_group.execute(_set_torch_distributed_env_vars)
            ray.get(
                [
                    worker_group.execute_single_async(
                        rank,
                        join_group,
                        backend_config.backend,
                        rank,
                        world_size,
                        host,
                        port,
                        seconds,
                    )
                    for rank in range(world_size)
                ]
            )

    class GroupConfig(TorchConfig):  # type: ignore[misc]
        @property
        def backend_cls(self) -> type:
            return Backend

    return GroupConfig(backend=backend, timeout_s=timeout_seconds)


def before_resizing(leave: Callable[[Callable[[float], bool]], None]) -> Any:
    """Returns a callback of Ray Train that calls `leave` before ranks are ended to start more.

    `leave` is given what tells, within so many seconds, whether the ranks have ended. Publicly
    nothing is called between Ray's decision to resize and the end of the ranks.
    """
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
    from ray.train.v2._internal.execution.controller.state import ResizingState

    class BeforeResizing(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
        def after_worker_group_training_start(self, worker_group: Any) -> None:
            self._ranks = worker_group

        def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:  # noqa: ARG002
            if isinstance(current_state, ResizingState):
                leave(self._have_ended)

        def _have_ended(self, timeout: float) -> bool:
            status = self._ranks.poll_status(timeout=timeout)
            return bool(status.finished or status.errors)

    return BeforeResizing()


def cause_of(failure: Any) -> Any:
    """Returns the error of a rank itself, which Ray wraps in one with a trace for its text."""
    return getattr(failure, "_base_exc", failure)
