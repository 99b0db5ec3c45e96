"""Experiment trackers, told of each line that a run logs.

A tracker is given each line that `launch_all` tells of, in the process that launches, so ranks
know of none. metrics.jsonl stays the record; a tracker holds what it was told. A run that is gone
on with is one run in each tracker; the steps that are made again come again.
"""

import contextlib
import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from pipeline import storage
from pipeline.config import Config
from pipeline.errors import ConfigError

Line = Mapping[str, Any]
Listener = Callable[[Line], None]

NOT_FIGURES = ("step", "time")


class TensorBoardConfig(Config):
    """Event files in RUN/tensorboard, a folder for each phase."""


class MlflowConfig(Config):
    """A run of an experiment on a tracking server."""

    uri: str | None = Field(
        default=None, description="the tracking server; null: MLFLOW_TRACKING_URI names it"
    )
    experiment: str = Field(
        default="sightline", description="the experiment that the run belongs to"
    )


class WandbConfig(Config):
    """A run of a project, its files in RUN/wandb."""

    project: str = Field(default="sightline", description="the project that the run belongs to")
    entity: str | None = Field(
        default=None, description="the user or team; null: the account's own"
    )
    mode: Literal["online", "offline"] | None = Field(
        default=None, description="null: WANDB_MODE says it, or online"
    )


class TrackersConfig(Config):
    """Which trackers are told; those that are given, `tensorboard: {}` being one."""

    tensorboard: TensorBoardConfig | None = Field(
        default=None, description="event files in RUN/tensorboard, a folder for each phase"
    )
    mlflow: MlflowConfig | None = Field(default=None, description="a run of an MLflow experiment")
    wandb: WandbConfig | None = Field(
        default=None, description="a run of a Weights & Biases project, its files in RUN/wandb"
    )

    def check(self) -> None:
        """Raises ConfigError naming each tracker whose library is not installed, and how to."""
        faults = [
            f"trackers.{name}: its library is not installed; `pip install {package}`"
            for name, (module, package) in LIBRARIES.items()
            if getattr(self, name) is not None and importlib.util.find_spec(module) is None
        ]
        if faults:
            raise ConfigError("\n".join(faults))


LIBRARIES = {  # tracker -> (module, what to install)
    "tensorboard": ("tensorboard", "tensorboard"),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "wandb": ("wandb", "wandb"),
}


@contextlib.contextmanager
def tracking(
    config: TrackersConfig, run: str, name: str, recipe: Mapping[str, Any]
) -> Iterator[Listener]:
    """Yields what passes a run's lines on to every tracker of the config.

    `run` is the folder of results, which tells this run from others. Raises ConfigError as
    `config.check` does.
    """
    config.check()
    run = storage.absolute(run)
    with contextlib.ExitStack() as opened:
        listeners = []
        if config.tensorboard is not None:
            listeners.append(opened.enter_context(_tensorboard(run)))
        if config.mlflow is not None:
            listeners.append(opened.enter_context(_mlflow(config.mlflow, run, name, recipe)))
        if config.wandb is not None:
            listeners.append(opened.enter_context(_wandb(config.wandb, run, name, recipe)))

        def tell(line: Line) -> None:
            if "loss" in line:
                for listener in listeners:
                    listener(line)

        yield tell


def figures(line: Line) -> dict[str, float]:
    """Returns the numbers of a line under flat names, as `losses/mlm`."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": float(number) for inner, number in value.items()}
        elif isinstance(value, int | float) and name not in NOT_FIGURES:
            found[name] = float(value)
    return found


@contextlib.contextmanager
def _tensorboard(run: str) -> Iterator[Listener]:
    from torch.utils.tensorboard import SummaryWriter

    with contextlib.ExitStack() as writers:
        of_phases: dict[str, SummaryWriter] = {}

        def tell(line: Line) -> None:
            phase, step = line["phase"], line["step"]
            if phase not in of_phases:
                folder = storage.local_path(storage.join(run, "tensorboard", phase))
                # what an interrupted command told of this step and later ones is hidden
                of_phases[phase] = SummaryWriter(str(folder), purge_step=step)
                writers.callback(of_phases[phase].close)
            for name, value in figures(line).items():
                of_phases[phase].add_scalar(name, value, step, walltime=line["time"])

        yield tell


@contextlib.contextmanager
def _mlflow(
    config: MlflowConfig, run: str, name: str, recipe: Mapping[str, Any]
) -> Iterator[Listener]:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(config.uri)
    known = client.get_experiment_by_name(config.experiment)
    experiment = known.experiment_id if known else client.create_experiment(config.experiment)
    found = client.search_runs([experiment], f"tags.`sightline.run` = '{run}'", max_results=1)
    if found:
        run_id = found[0].info.run_id
        client.update_run(run_id, status="RUNNING")
    else:
        tags = {"sightline.run": run}
        run_id = client.create_run(experiment, tags=tags, run_name=name).info.run_id
        client.log_dict(run_id, dict(recipe), "recipe.yaml")

    def tell(line: Line) -> None:
        when, step = int(1000 * line["time"]), line["step"]
        client.log_batch(
            run_id,
            metrics=[
                Metric(f"{line['phase']}/{figure}", value, when, step)
                for figure, value in figures(line).items()
            ],
        )

    status = "FAILED"
    try:
        yield tell
        status = "FINISHED"
    finally:
        client.set_terminated(run_id, status)


@contextlib.contextmanager
def _wandb(
    config: WandbConfig, run: str, name: str, recipe: Mapping[str, Any]
) -> Iterator[Listener]:
    import wandb

    folder = storage.local_path(run)
    folder.mkdir(parents=True, exist_ok=True)
    with wandb.init(
        project=config.project,
        entity=config.entity,
        name=name,
        id=hashlib.sha256(run.encode()).hexdigest()[:16],  # one run here, however often it starts
        resume="allow",
        dir=str(folder),
        config=dict(recipe),
        mode=config.mode,
        settings=wandb.Settings(console="off", silent=True),
    ) as opened:
        told: set[str] = set()

        def tell(line: Line) -> None:
            phase = line["phase"]
            if phase not in told:
                # wandb's own step may only rise, and phases count from 1 each
                opened.define_metric(f"{phase}/step")
                opened.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
                told.add(phase)
            named = {f"{phase}/{figure}": value for figure, value in figures(line).items()}
            opened.log({f"{phase}/step": line["step"], **named})

        yield tell
