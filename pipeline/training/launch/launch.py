"""The launch of ranks: on Ray Train, or in this process.

The one module that meets Ray Train. Ray restarts ranks that died; what they continue from is
our own newest whole checkpoint, so Ray is told of none and keeps no state that could go stale.
"""

import atexit
import contextlib
import ipaddress
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import replace
from datetime import timedelta
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]
from pydantic import ValidationError

from pipeline import storage
from pipeline.cluster import ClusterConfig, start_ray
from pipeline.config import as_now, selected, settings
from pipeline.errors import ConfigError, PipelineError, StorageError, TrainingError
from pipeline.resources import Waiting, require_cluster
from pipeline.scratch import scratch_folder
from pipeline.training.config import TrainingConfig
from pipeline.training.continuation import differences, fixed
from pipeline.training.spec import Environment, TrainingResult, TrainingSpec

if TYPE_CHECKING:
    from pipeline.training.assembly import Assembly

Progress = Callable[[dict[str, Any]], None]
Assembled = Callable[[TrainingSpec], "Assembly"]

SPEC = "spec.json"  # RUN/<phase>/spec.json: what the phase is, for those who read its folder
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_BETWEEN_LOOKS_FOR_ROOM = 5.0
_RESIZING = b"resizing"  # in a request to stop that its maker takes back
SECONDS_BETWEEN_RESIZES = 60.0  # ranks start anew with each, which takes some ten seconds


def launch(
    spec: TrainingSpec,
    cluster: ClusterConfig,
    on_progress: Progress,
    assembled: Assembled | None = None,
) -> TrainingResult:
    """Trains one phase; see launch_all."""
    return launch_all([spec], cluster, on_progress, assembled)[0]


def launch_all(
    specs: Sequence[TrainingSpec],
    cluster: ClusterConfig,
    on_progress: Progress,
    assembled: Assembled | None = None,
) -> list[TrainingResult]:
    """Trains phases one after another on the same ranks, which start and import only once.

    `assembled` builds a phase's parts on a rank; left out, it is the one of every run.
    `on_progress` is called, from a thread of this process, with each new line of a phase's metrics
    (they have `loss`) and events (they have `event`), and the phase's name as `phase`. SIGTERM
    makes the phase that is training write a checkpoint and leave; its result says `stopped`, and
    later phases are not begun or in the list. What is finished already is left as it is. Raises a
    PipelineError of one sentence for whatever goes wrong on a rank.
    """
    from pipeline.training.loop import finished_result

    for spec in specs:
        for world_size in cluster.world_sizes():  # refused here, before anything starts
            spec.training.accumulation_steps(world_size)
    finished = [finished_result(spec) for spec in specs]
    if all(finished):
        return [result for result in finished if result is not None]
    if cluster.device_flops is not None:
        stated = {"device_flops": cluster.device_flops}
        specs = [spec.model_copy(update=stated) for spec in specs]
    listeners: list[Progress] = []
    if os.environ.get("RANK", "0") == "0":  # under torchrun, one of the ranks tells
        listeners.append(on_progress)
        for spec in specs:
            _record(spec)
    if cluster.runner == "ray":
        start_ray(cluster)
        listeners.append(_gauges(specs[0].folder.rsplit("/", 2)[-2]))
    with _following(specs, listeners), _stopping_on_request(specs):
        if cluster.runner == "process":
            return _run_here(specs, cluster, assembled)
        return _run_on_ray(specs, cluster, assembled)


def read_spec(folder: str) -> TrainingSpec:
    """Returns what a phase's folder holds a run of; raises TrainingError if nobody has told.

    A training setting that this release does not have is left out.
    """
    try:
        document = json.loads(storage.read_bytes(storage.join(folder, SPEC)))
        training = as_now(TrainingConfig, document["training"])
        known = selected(training, settings(TrainingConfig))
        return TrainingSpec.model_validate({**document, "training": known})
    except (
        StorageError,
        ValidationError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:
        raise TrainingError(f"{folder}: {SPEC} does not say what was trained: {error}") from error


def _record(spec: TrainingSpec) -> None:
    """Leaves the spec in its folder, unless another run is there, which the ranks will refuse."""
    with contextlib.suppress(TrainingError):  # there is none, or one that nobody can use
        begun = read_spec(spec.folder).reproducibility_key()
        if fixed(differences(begun, spec.reproducibility_key(), spec.phase)):
            return
    location = storage.join(spec.folder, SPEC)
    storage.write_bytes(location, spec.model_dump_json(indent=1).encode())


def _train_each(
    specs: Sequence[TrainingSpec], environment: Environment, assembled: Assembled | None
) -> list[TrainingResult]:
    from pipeline.training.assembly import assemble
    from pipeline.training.loop import train

    results = []
    for spec in specs:
        results.append(train(spec, environment, assembled or assemble))
        if results[-1].state == "stopped":
            break
    return results


def _run_here(
    specs: Sequence[TrainingSpec], cluster: ClusterConfig, assembled: Assembled | None
) -> list[TrainingResult]:
    import torch
    import torch.distributed as dist

    rank, world_size, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if world_size != cluster.workers:
        raise ConfigError(
            f"cluster.workers: found {cluster.workers}, but runner=process has {world_size} "
            "process(es); set workers to that, start as many with torchrun, or use runner=ray"
        )
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads its device from it
    device = "cpu"
    if cluster.gpus_per_worker:
        if not torch.cuda.is_available():
            raise ConfigError("cluster.gpus_per_worker: found 1, but torch sees no GPU here; use 0")
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        store = None
        if world_size == 1:  # alone, it needs no port
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(
            "nccl" if cluster.gpus_per_worker else "gloo",
            store=store,
            rank=rank if store else -1,
            world_size=world_size if store else -1,
            timeout=timedelta(seconds=_timeout_seconds(specs)),
        )
        # Not before: DeepSpeed remembers the group, and later phases of a command use it again.
        atexit.register(dist.destroy_process_group)
    return _train_each(specs, Environment(rank, world_size, local_rank, device), assembled)


def _run_on_ray(
    specs: Sequence[TrainingSpec], cluster: ClusterConfig, assembled: Assembled | None
) -> list[TrainingResult]:
    from pipeline.training.loop import finished_result

    finished_before = {spec.folder for spec in specs if finished_result(spec)}
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    is_elastic = cluster.min_workers is not None
    if is_elastic:
        for name, value in _ELASTIC_SETTINGS.items():
            os.environ.setdefault(name, value)
    resources = {"CPU": float(cluster.cpus_per_worker)}
    if cluster.gpus_per_worker:
        resources["GPU"] = float(cluster.gpus_per_worker)
    # Ray's notes on a run that it is never asked to continue; it cannot be given our object stores.
    state = (
        storage.join(specs[0].folder, "ray")
        if storage.is_local(specs[0].folder)
        else str(scratch_folder())
    )
    trainer = _trainer(cluster)(
        _on_ray_worker,
        train_loop_config={
            "specs": [spec.model_dump(mode="json") for spec in specs],
            "assembled": assembled,
        },
        torch_config=_group_config(
            "nccl" if cluster.gpus_per_worker else "gloo", _timeout_seconds(specs)
        ),
        scaling_config=ScalingConfig(
            num_workers=((cluster.min_workers, cluster.workers) if is_elastic else cluster.workers),
            elastic_resize_monitor_interval_s=SECONDS_BETWEEN_RESIZES,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex,  # never continued: its snapshot may be torn, ours cannot
            storage_path=storage.absolute(state),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=_callbacks(specs),
        ),
    )
    waiting = Waiting(specs[0].phase, cluster.world_sizes()[0], cluster.each_worker())
    try:
        waiting.require_room()
        _fit(trainer, waiting, resources)
    except PipelineError:
        raise
    except Exception as error:
        require_cluster()  # else it is of no use to say which of its processes were lost
        raise _in_one_sentence(error, specs[0]) from None
    finally:
        storage.remove(state)
    return _results(specs, finished_before)


def _trainer(cluster: ClusterConfig) -> Any:
    """Returns Ray's trainer without actors that are of no use here: each takes seconds to start."""
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )

    needless: tuple[type, ...] = (DatasetsCallback,)  # Ray's own datasets: there are none
    if cluster.address is None:  # reservations of a controller that died: so did its Ray
        needless += (PlacementGroupCleanerCallback,)

    class Trainer(TorchTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [one for one in callbacks if not isinstance(one, needless)]

    return Trainer


def _group_config(backend: str, timeout_seconds: int) -> Any:
    """Returns how ranks become a process group: by a store that only their network can reach.

    That of torch, which Ray would have them use, listens on every interface of its machine.
    """
    import ray
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

    class Backend(_TorchBackend):  # type: ignore[misc]
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            world_size, seconds = len(worker_group), backend_config.timeout_s
            host, port = worker_group.execute_single(0, _open_store, world_size, seconds)
            worker_group.execute(_set_torch_distributed_env_vars)
            ray.get(
                [
                    worker_group.execute_single_async(
                        rank,
                        _join_group,
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


_stores: list[Any] = []  # of the rank 0 that this process is


def _open_store(world_size: int, timeout_seconds: int) -> tuple[str, int]:
    """Opens the store at which ranks find each other, on the address of this node only."""
    import ray
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family, backlog=1024)
    port = listener.getsockname()[1]
    store = TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        timeout=timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    _stores[:] = [store]
    return host, port


def _join_group(
    backend: str, rank: int, world_size: int, host: str, port: int, timeout_seconds: int
) -> None:
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    timeout = timedelta(seconds=timeout_seconds)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = host, str(port)
    if ipaddress.ip_address(host).is_loopback:  # then ranks meet there, and nowhere else
        loopback = _interface_of(host)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    store = (
        _stores[0]
        if rank == 0
        else TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _interface_of(host: str) -> str:
    interfaces: dict[str, list[Any]] = psutil.net_if_addrs()
    return next(
        name
        for name, addresses in interfaces.items()
        if any(address.address == host for address in addresses)
    )


def _callbacks(specs: Sequence[TrainingSpec]) -> list[Any]:
    """Returns what Ray Train's controller is to do beside its own."""
    from ray.train import UserCallback
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
    from ray.train.v2._internal.execution.controller.state import ResizingState

    folders = [spec.folder for spec in specs]
    seconds = _timeout_seconds(specs)

    class EndOnRefusal(UserCallback):  # type: ignore[misc]
        """Keeps Ray from repeating what fails the same way each time: an error of our own."""

        def after_exception(
            self,
            run_context: Any,  # noqa: ARG002 (Ray passes it by name)
            worker_exceptions: dict[int, Any],
        ) -> None:
            refusal = _refusal(worker_exceptions)
            if refusal is not None:
                raise refusal

    class SaveBeforeResizing(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
        """Lets ranks write a checkpoint before Ray ends them to start more: no step is repeated."""

        def after_worker_group_training_start(self, worker_group: Any) -> None:
            self._ranks = worker_group

        def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:  # noqa: ARG002
            if isinstance(current_state, ResizingState):
                with _asked_to_leave(folders):
                    deadline = time.monotonic() + seconds
                    while time.monotonic() < deadline:
                        time.sleep(SECONDS_BETWEEN_LOOKS)
                        status = self._ranks.poll_status(timeout=SECONDS_BETWEEN_LOOKS)
                        if status.finished or status.errors:
                            return

    return [EndOnRefusal(), SaveBeforeResizing()]


@contextlib.contextmanager
def _asked_to_leave(folders: Sequence[str]) -> Iterator[None]:
    """Has ranks write a checkpoint and return, inside the block; what others ask stays asked."""
    from pipeline.training.loop import STOP

    requests = [storage.join(folder, STOP) for folder in folders]
    for request in requests:
        if not storage.exists(request):
            storage.write_bytes(request, _RESIZING)
    try:
        yield
    finally:
        for request in requests:
            if storage.exists(request) and storage.read_bytes(request) == _RESIZING:
                storage.remove(request)


def _fit(trainer: Any, waiting: Waiting, each: Mapping[str, float]) -> None:
    """Waits for Ray Train beside the main thread, in which it would take Ctrl-C for itself."""
    done: futures.Future[None] = futures.Future()

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=fit, name="ray-train", daemon=True).start()
    while not futures.wait([done], SECONDS_BETWEEN_LOOKS_FOR_ROOM).done:
        waiting.look(partial(_is_pending, each))
    done.result()


def _is_pending(each: Mapping[str, float]) -> bool:
    """Tells whether ranks that ask for this are waited for."""
    from ray.util import placement_group_table

    return any(
        group["state"] == "PENDING"
        and any(bundle.items() >= each.items() for bundle in group["bundles"].values())
        for group in placement_group_table().values()
    )


def _on_ray_worker(config: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    environment = Environment(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        device=str(ray.train.torch.get_device()),
    )
    specs = [TrainingSpec.model_validate(spec) for spec in config["specs"]]
    _train_each(specs, environment, config["assembled"])


def _results(specs: Sequence[TrainingSpec], finished_before: set[str]) -> list[TrainingResult]:
    """Reads how phases ended from their folders, up to the first that was stopped."""
    from pipeline.training.loop import finished_result
    from pipeline.training.tracking.metrics_log import last_loss, read_events

    results = []
    for spec in specs:
        result = finished_result(spec)
        if result is None:
            stops = [event for event in read_events(spec.folder) if event["event"] == "stopped"]
            step, steps = stops[-1]["step"], spec.training.steps
            results.append(TrainingResult("stopped", step, steps, last_loss(spec.folder), None))
            break
        results.append(replace(result, already_finished=spec.folder in finished_before))
    return results


def _refusal(failures: dict[int, Any]) -> PipelineError | None:
    """Returns the error of our own among the ranks' failures, with the rank in front."""
    for rank, failure in sorted(failures.items()):
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, PipelineError):
            return type(cause)(f"rank {rank}: {cause}")
    return None


def _in_one_sentence(error: Exception, spec: TrainingSpec) -> PipelineError:
    """Says what ended a Ray Train run; the whole trace goes into the run's folder."""
    cause = getattr(error, "controller_failure", error)
    if isinstance(cause, PipelineError):
        return cause
    failures = getattr(error, "worker_failures", {})
    refusal = _refusal(failures)
    if refusal is not None:
        return refusal
    trace = storage.join(spec.folder, "failure.txt")
    storage.write_bytes(trace, str(error).encode())
    reasons = [
        f"rank {rank}: {_last_line(failure)}" for rank, failure in sorted(failures.items())
    ] or [f"the process that leads the ranks: {_last_line(cause)}"]
    return TrainingError(f"{spec.phase}: {'; '.join(reasons)}; the whole trace is in {trace}")


def _last_line(error: Any) -> str:
    from ray.exceptions import OutOfMemoryError, RayActorError

    if isinstance(error, OutOfMemoryError):
        return (
            "its machine's memory ran out, so Ray killed processes; free some, or use fewer "
            "cluster.workers or a smaller micro_batch_size, and start again: it goes on"
        )
    cause = getattr(error, "_base_exc", error)
    if isinstance(cause, RayActorError):
        return (
            "lost, with its node or by itself, and not to be restarted (cluster.max_failures); "
            "start again: it goes on from the last checkpoint"
        )
    if isinstance(cause, ModuleNotFoundError):
        return f"{cause} on its node; install Sightline and what it needs on every node"
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {text[-1]}" if text else type(cause).__name__


def _timeout_seconds(specs: Sequence[TrainingSpec]) -> int:
    return max(spec.training.timeout_seconds for spec in specs)


def _gauges(run: str) -> Progress:
    """Returns what shows a run's newest figures to Prometheus, through Ray's own metrics."""
    from ray.util.metrics import Gauge

    gauges = {
        name: Gauge(f"sightline_training_{name}", description, tag_keys=("run", "phase"))
        for name, description in _GAUGES.items()
    }
    last: dict[str, dict[str, Any]] = {}

    def show(line: dict[str, Any]) -> None:
        if "loss" not in line:
            return
        phase = line["phase"]
        before, last[phase] = last.get(phase), line
        shown = dict(line)
        if before is not None and line["step"] > before["step"]:
            steps = line["step"] - before["step"]
            shown["step_seconds"] = (line["time"] - before["time"]) / steps
        for name, gauge in gauges.items():
            if name in shown:
                gauge.set(shown[name], tags={"run": run, "phase": phase})

    return show


@contextlib.contextmanager
def _following(specs: Sequence[TrainingSpec], listeners: Sequence[Progress]) -> Iterator[None]:
    """Calls the listeners from a thread with the lines that the phases log inside the block."""
    from pipeline.training.tracking.metrics_log import EVENTS, METRICS, Follower

    logs = [
        (spec.phase, Follower(spec.folder, name)) for spec in specs for name in (EVENTS, METRICS)
    ]

    def look() -> None:
        for phase, log in logs:
            for line in log.new_lines():
                for listener in listeners:
                    listener({"phase": phase, **line})

    def look_until_done() -> None:
        while not done.wait(SECONDS_BETWEEN_LOOKS):
            look()

    done = threading.Event()
    thread = threading.Thread(target=look_until_done, name="follow-training", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        look()


@contextlib.contextmanager
def _stopping_on_request(specs: Sequence[TrainingSpec]) -> Iterator[None]:
    """Turns SIGTERM, or a first Ctrl-C, into a request to stop; a second Ctrl-C interrupts.

    Only a main thread can; in others signals are left as they are.
    """
    from pipeline.training.loop import clear_stop, request_stop

    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        for spec in specs:
            request_stop(spec.folder)

    for spec in specs:  # a request that an earlier command did not live to carry out
        clear_stop(spec.folder)
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for spec in specs:
            clear_stop(spec.folder)


_GAUGES = {
    "step": "Updates done",
    "loss": "Loss of the last logged step, over the global batch",
    "lr": "Learning rate",
    "grad_norm": "Norm of the gradient before clipping",
    "samples_per_second": "Samples trained on, over all ranks",
    "tokens_per_second": "Real tokens and regions trained on, over all ranks",
    "step_seconds": "Time from one step to the next",
    "data_wait_fraction": "Share of the time in which ranks waited for data",
    "mfu": "Share of the devices' best rate of computing that the encoder made use of",
}
_ELASTIC_SETTINGS = {
    # For twenty seconds after a node's end Ray counts on it, and tries to start as many ranks as
    # before; it would wait a minute for each try.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
}
