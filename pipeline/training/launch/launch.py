"""The launch of training: phases, one after another, on the ranks of a cluster."""

import os
from collections.abc import Sequence

from pipeline.cluster import ClusterConfig, start_ray
from pipeline.training.launch.followers import Progress, following
from pipeline.training.launch.gauges import gauges
from pipeline.training.launch.in_process import run_in_process
from pipeline.training.launch.phases import Assembled
from pipeline.training.launch.ray_train import run_on_ray
from pipeline.training.launch.recorded_spec import record
from pipeline.training.spec import TrainingResult, TrainingSpec
from pipeline.training.stop_request import stopping_on_signals


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
    from pipeline.training.result import finished_result

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
            record(spec)
    if cluster.runner == "ray":
        start_ray(cluster)
        listeners.append(gauges(specs[0].folder.rsplit("/", 2)[-2]))
    with following(specs, listeners), stopping_on_signals([spec.folder for spec in specs]):
        if cluster.runner == "process":
            return run_in_process(specs, cluster, assembled)
        return run_on_ray(specs, cluster, assembled)
