"""Ranks on Ray Train.

Ray restarts ranks that died; what they continue from is our own newest whole checkpoint, so Ray is
told of none and keeps no state that could go stale.
"""

import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from functools import partial
from typing import Any

from pipeline import ray_2_60, storage
from pipeline.cluster import ClusterConfig
from pipeline.errors import PipelineError
from pipeline.resources import Waiting, require_cluster
from pipeline.scratch import scratch_folder
from pipeline.training.launch.failures import in_one_sentence, refusal
from pipeline.training.launch.phases import Assembled, results_of, timeout_seconds, train_each
from pipeline.training.launch.process_group import join_group, open_store
from pipeline.training.spec import RankContext, TrainingResult, TrainingSpec
from pipeline.training.stop_request import asked_to_leave

SECONDS_BETWEEN_POLLS = 0.2  # of ranks that were asked to leave
SECONDS_BETWEEN_CHECKS_OF_ROOM = 5.0
SECONDS_BETWEEN_RESIZES = 60.0  # ranks start anew with each, which takes some ten seconds
_ELASTIC_SETTINGS = {
    # For twenty seconds after a node's end Ray counts on it, and tries to start as many ranks as
    # before; it would wait a minute for each try.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
}


def run_on_ray(
    specs: Sequence[TrainingSpec], cluster: ClusterConfig, assembled: Assembled | None
) -> list[TrainingResult]:
    """Trains the phases on ranks that Ray Train starts, and starts again when they are lost."""
    from pipeline.training.result import finished_result

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
    trainer = ray_2_60.trainer_without_needless_actors(is_own_cluster=cluster.address is None)(
        _on_ray_worker,
        train_loop_config={
            "specs": [spec.model_dump(mode="json") for spec in specs],
            "assembled": assembled,
        },
        torch_config=ray_2_60.group_config(
            "nccl" if cluster.gpus_per_worker else "gloo",
            timeout_seconds(specs),
            open_store,
            join_group,
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
        raise in_one_sentence(error, specs[0]) from None
    finally:
        storage.remove(state)
    return results_of(specs, finished_before)


def _callbacks(specs: Sequence[TrainingSpec]) -> list[Any]:
    """Returns what Ray Train's controller is to do beside its own."""
    from ray.train import UserCallback

    folders = [spec.folder for spec in specs]
    seconds = timeout_seconds(specs)

    class EndOnRefusal(UserCallback):  # type: ignore[misc]
        """Keeps Ray from repeating what fails the same way each time: an error of our own."""

        def after_exception(
            self,
            run_context: Any,  # noqa: ARG002 (Ray passes it by name)
            worker_exceptions: dict[int, Any],
        ) -> None:
            refused = refusal(worker_exceptions)
            if refused is not None:
                raise refused

    def save_and_leave(have_ended: Callable[[float], bool]) -> None:
        """Lets ranks write a checkpoint before Ray ends them to start more: no step is repeated."""
        with asked_to_leave(folders):
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                time.sleep(SECONDS_BETWEEN_POLLS)
                if have_ended(SECONDS_BETWEEN_POLLS):
                    return

    return [EndOnRefusal(), ray_2_60.before_resizing(save_and_leave)]


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
    while not futures.wait([done], SECONDS_BETWEEN_CHECKS_OF_ROOM).done:
        waiting.tell_if_waiting(partial(_is_pending, each))
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
    rank_context = RankContext(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        device=str(ray.train.torch.get_device()),
    )
    specs = [TrainingSpec.model_validate(spec) for spec in config["specs"]]
    train_each(specs, rank_context, config["assembled"])
