"""A module and batches that follow the loop's interfaces and cost nothing: for tests of training.

The data of a step is a function of (seed, step, place in the global batch), as the loader's is.
"""

import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline import storage
from pipeline.errors import FeatureError
from pipeline.training.assembly import Assembly
from pipeline.training.config import TrainingConfig
from pipeline.training.evaluation import Evaluate, held_out_losses
from pipeline.training.loop import train
from pipeline.training.spec import RankContext, TrainingSpec
from pipeline.training.tracking.metrics_log import read_metrics

OnStep = Callable[[int, int], None]
Sizes = Callable[[int, int], list[int]]
Assembled = Callable[..., Assembly]

FEATURES, WIDTH, CLASSES = 5, 7, 3  # odd sizes: no stage divides them evenly over two ranks


@dataclass(frozen=True)
class StandInBatch:
    features: Tensor  # (B, FEATURES)
    targets: Tensor  # (B, CLASSES)
    num_samples: int
    num_tokens: int
    num_tokens_with_padding: int
    on_taken: Callable[[], None] | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> "StandInBatch":
        if self.on_taken:
            self.on_taken()
        moved = self.features.to(device, dtype), self.targets.to(device, dtype)
        return replace(self, features=moved[0], targets=moved[1])


class StandIn(nn.Module):
    """Two objectives over one forward pass, with dropout, a norm and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(FEATURES, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(0.2)
        self.out = nn.Linear(WIDTH, CLASSES)
        self.unused = nn.Linear(2, CLASSES)  # like a head of another phase
        self.register_buffer("scale", torch.tensor([0.5, 2.0]))

    def forward(self, batch: StandInBatch) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.dropout(self.norm(self.hidden(batch.features)).relu())
        error = self.out(hidden) - batch.targets
        squared, absolute = error.float().pow(2).mean(), error.float().abs().mean()
        return squared + 0.3 * absolute, {"sq": squared.detach(), "abs": absolute.detach()}


def make_spec(folder: Path | str, **training: Any) -> TrainingSpec:
    """Each of `training` takes the place of a setting here; a group's, of those that it names."""
    settings: dict[str, Any] = {
        "steps": 8,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "optimizer": {"learning_rate": 0.02},
        "schedule": {"warmup_steps": 2},
        "checkpoints": {"every_steps": 3},
        "timeout_seconds": 60,
        # small parameters would be kept whole by stage 3; here they are cut, as large ones are
        "deepspeed": (
            {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
            if training.get("zero_stage") == 3
            else {}
        ),
    }
    for group in ("optimizer", "schedule", "checkpoints"):
        training[group] = {**settings[group], **training.get(group, {})}
    return TrainingSpec(
        phase="pretrain",
        folder=str(folder),
        dataset="none",
        dataset_version=1,
        features=None,
        family="stand-in",
        model={},
        tokenizer="none",
        max_tokens=4,
        objectives={},
        seed=11,
        training=TrainingConfig(**{**settings, **training}),
    )


def stand_in(
    spec: TrainingSpec, on_step: OnStep | None = None, sizes: Sizes | None = None
) -> Assembly:
    """`on_step` is called with (step, rank) as a rank begins a step, from 1.

    `sizes` are the micro-batches of (step, rank), if they are not those of the config.
    """
    torch.manual_seed(spec.seed)
    config = spec.training

    def batches(
        start: int, rank: int, world_size: int
    ) -> Generator[list[StandInBatch], None, None]:
        places = config.share(rank, world_size)
        num_parts = min(len(places), config.accumulation_steps(world_size))
        for step in range(start, config.steps):
            rows = torch.stack([_row(spec.seed, step, place) for place in places])
            parts = [
                StandInBatch(part[:, :FEATURES], part[:, FEATURES:], len(part), 3 * len(part), 12)
                for part in (
                    torch.split(rows, sizes(step, rank))
                    if sizes
                    else torch.tensor_split(rows, num_parts)
                )
            ]
            if on_step:
                parts[0] = replace(parts[0], on_taken=partial(on_step, step + 1, rank))
            yield parts

    def save(weights: dict[str, Tensor], _: int) -> None:
        location = storage.join(spec.folder, "model", "model.safetensors")
        storage.write_bytes(location, safetensors.torch.save(weights))

    return Assembly(StandIn(), batches, save)


def without_dropout(spec: TrainingSpec, on_step: OnStep | None = None) -> Assembly:
    """A rank draws dropout for its own samples; without it, the loss knows no world size."""
    assembly = stand_in(spec, on_step)
    assembly.module.dropout.p = 0.0  # type: ignore[union-attr]
    return assembly


def unevenly(spec: TrainingSpec, on_step: OnStep | None = None) -> Assembly:
    """Two ranks' four samples each, in micro-batches of all sizes, and seldom as many on both."""

    def sizes(step: int, rank: int) -> list[int]:
        return [[4], [1, 3], [2, 1, 1], [1, 1, 1, 1]][(step + 2 * rank + step // 4) % 4]

    assembly = stand_in(spec, on_step, sizes)
    assembly.module.dropout.p = 0.0  # type: ignore[union-attr]
    return assembly


@dataclass(frozen=True)
class Poisoned:
    """Assembles the stand-in with NaN for a target in some steps of some rank."""

    steps: tuple[int, ...]
    rank: int = 0

    def __call__(self, spec: TrainingSpec, on_step: OnStep | None = None) -> Assembly:
        assembly = stand_in(spec, on_step)

        def batches(
            start: int, rank: int, world_size: int
        ) -> Generator[list[StandInBatch], None, None]:
            made: Any = assembly.batches(start, rank, world_size)
            for step, parts in enumerate(made, start=start + 1):
                if step in self.steps and rank == self.rank:
                    parts[-1].targets[0, 0] = math.nan
                yield parts

        return replace(assembly, batches=batches)


def evaluated(
    spec: TrainingSpec, on_step: OnStep | None = None, evaluate: Evaluate | None = None
) -> Assembly:
    """The stand-in with an evaluation: its losses on rows that no step trains on."""

    def held_out(module: nn.Module, rank_context: RankContext) -> Mapping[str, float]:
        places = range(rank_context.rank, 12, rank_context.world_size)
        rows = torch.stack([_row(99, 0, place) for place in places])
        batches = (
            StandInBatch(part[:, :FEATURES], part[:, FEATURES:], len(part), len(part), 1)
            for part in torch.split(rows, 4)
        )
        num_passes = math.ceil(math.ceil(12 / rank_context.world_size) / 4)
        return held_out_losses(module, batches, rank_context, num_passes)

    return replace(stand_in(spec, on_step), evaluate=evaluate or held_out)


def evaluated_without_dropout(spec: TrainingSpec, on_step: OnStep | None = None) -> Assembly:
    """The held-out samples of a rank in passes of the config's size, as those of a run are."""
    assembly = without_dropout(spec, on_step)
    held_out = stand_in(spec).batches

    def evaluate(module: nn.Module, rank_context: RankContext) -> Mapping[str, float]:
        step = next(held_out(0, rank_context.rank, rank_context.world_size))
        num_passes = spec.training.accumulation_steps(rank_context.world_size)
        return held_out_losses(module, step, rank_context, num_passes)

    return replace(assembly, evaluate=evaluate)


def _row(seed: int, step: int, place: int) -> Tensor:
    noise = np.random.default_rng((seed, step, place)).normal(size=FEATURES)
    answer = np.sin(noise[:CLASSES]) + noise[CLASSES - 1 : CLASSES + 2][:CLASSES]
    return torch.tensor(np.concatenate([noise, answer]), dtype=torch.float32)


def in_processes(world_size: int, work: Callable[..., Any], *arguments: Any) -> list[int]:
    """Calls work(rank, *arguments) in processes with a gloo group; returns their exit codes."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # read as DeepSpeed is imported
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "pipeline.training.loop",
            "deepspeed",
            "torch._dynamo",
            "transformers.models.auto.tokenization_auto",
            __name__,
        ]
    )
    store = Path(arguments[0].folder).parent / f"store-{os.urandom(4).hex()}"
    processes = [
        context.Process(target=_rank, args=(rank, world_size, store, work, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode or 0 for process in processes]


def train_on(world_size: int, spec: TrainingSpec, assembled: Assembled = stand_in) -> None:
    """Trains on so many processes; they must all succeed."""
    assert in_processes(world_size, train_rank, spec, assembled) == [0] * world_size


def train_rank(rank: int, spec: TrainingSpec, assembled: Assembled) -> None:
    train(spec, RankContext(rank, dist.get_world_size(), rank, "cpu"), assembled)


def train_and_die(
    rank: int, spec: TrainingSpec, victim: int, step: int, assembled: Assembled = stand_in
) -> None:
    """Kills the process of one rank, as kill -9 does, as it begins a step."""

    def on_step(begun: int, of_rank: int) -> None:
        wait_for_writers()
        if (begun, of_rank) == (step, victim):
            os.kill(os.getpid(), 9)

    train_rank(rank, spec, partial(assembled, on_step=on_step))


def wait_for_writers() -> None:
    """Returns when no checkpoint of this process is being written; the next step publishes it."""
    for thread in threading.enumerate():
        if thread.name.startswith("write-checkpoint"):
            thread.join()


def train_until(rank: int, spec: TrainingSpec, steps: int, seconds: float) -> None:
    """Kills the process of rank 1 so many steps and seconds after it began, wherever it is then.

    However slow the machine, the steps before leave checkpoints.
    """
    begun = 0

    def on_step(_: int, rank: int) -> None:
        nonlocal begun
        begun += 1
        if begun <= steps:
            wait_for_writers()
        if rank == 1 and begun == steps:
            timer = threading.Timer(seconds, os.kill, (os.getpid(), 9))
            timer.daemon = True
            timer.start()
        time.sleep(0.01)

    train_rank(rank, spec, partial(stand_in, on_step=on_step))


def _rank(
    rank: int, world_size: int, store: Path, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(str(store), world_size),  # type: ignore[attr-defined]
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    work(rank, *arguments)
    dist.destroy_process_group()


def ray_worker(config: dict[str, Any]) -> None:
    """What a rank runs under Ray Train, with the stand-in for the model and the data."""
    import ray.train

    torch.set_num_threads(1)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    for document in config["specs"]:
        spec = TrainingSpec.model_validate(document)
        rank_context = RankContext(rank, world_size, context.get_local_rank(), "cpu")
        train(spec, rank_context, unhurried)


def leave_pid(spec: TrainingSpec, rank: int) -> None:
    """Leaves the number of this rank's process in the run's folder, for who wants to kill it."""
    written = Path(spec.folder) / f"pid-{rank}.new"
    written.write_text(str(os.getpid()))
    written.replace(written.with_suffix(""))  # whole, whenever it is read


def unhurried(spec: TrainingSpec) -> Assembly:
    """The stand-in, slow enough to be interrupted; a phase called `fails` fails on rank 1."""

    def on_step(_: int, rank: int) -> None:
        leave_pid(spec, rank)
        time.sleep(0.05)
        if spec.phase == "fails" and rank == 1:
            raise FeatureError("shard 7 has no features")

    return stand_in(spec, on_step)


def wait_until(reached: Callable[[], bool], seconds: float = 600) -> None:
    """Returns once something is so, within a generous time."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps_logged(spec: TrainingSpec) -> int:
    """Returns the number of lines that a run has logged."""
    return len(read_metrics(spec.folder))
