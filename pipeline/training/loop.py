"""Batches to a trained model: the order of a step, the same on one process and on a cluster.

A step is: take the micro-batches, forward and backward each, clip, update, log. Nothing random
outlives a step: data and corruption are functions of the step, and dropout is seeded from
(seed, step, rank) when the step begins. So the step number and the tensors of a checkpoint are
all that a run is, and it goes on bit-identically on the same number of ranks.
"""

import contextlib
import fcntl
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline import storage
from pipeline.errors import CheckpointError, StorageError, TrainingError
from pipeline.training import checkpoint
from pipeline.training.assembly import MODEL, Assembly, MicroBatch, assemble
from pipeline.training.engine import Engine
from pipeline.training.metrics_log import MetricsLog, read_metrics
from pipeline.training.prefetch import Prefetch
from pipeline.training.spec import Environment, TrainingResult, TrainingSpec

CHECKPOINTS = "checkpoints"
RESULT = "result.json"
LOCK = ".lock"
STOP = ".stop"

SECONDS_TO_WAIT_FOR_LOCK = 60.0  # a killed driver's local cluster is gone after seven or so


def train(
    spec: TrainingSpec,
    environment: Environment,
    assembled: Callable[[TrainingSpec], Assembly] = assemble,
) -> TrainingResult:
    """Trains to the end, or to a requested stop, from the newest checkpoint if there is one.

    Collective: every rank calls it, inside a process group. A run that was finished before is
    reported and left as it is. Raises CheckpointError if the folder holds another run, and
    TrainingError naming step, rank and objective if a loss is not finite.
    """
    finished = finished_result(spec)
    if finished is not None:
        return finished
    with contextlib.ExitStack() as stack:
        if environment.rank == 0:
            stack.enter_context(_only_writer(spec.folder))
        dist.barrier()  # the others touch nothing before the folder is ours
        return _Run(spec, environment, assembled(spec)).to_end()


def finished_result(spec: TrainingSpec) -> TrainingResult | None:
    """Returns how a run ended, if it has; raises CheckpointError if another run is there."""
    where = storage.join(spec.folder, RESULT)
    if not storage.exists(where):
        return None
    document = json.loads(storage.read_bytes(where))
    _require_same(spec, document["sequence"], spec.folder)
    model_folder = storage.join(spec.folder, MODEL)
    return TrainingResult(**document["result"], model_folder=model_folder, already_finished=True)


def request_stop(folder: str) -> None:
    """Asks a run, from any process, to write a checkpoint after the step it is in and leave."""
    storage.write_bytes(storage.join(folder, STOP), b"")


def clear_stop(folder: str) -> None:
    """Takes such a request back."""
    storage.remove(storage.join(folder, STOP))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Returns a 64-bit seed that is a function of all three."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class _StepFigures:
    """What all ranks did in one step, known to all of them."""

    loss: float
    losses: dict[str, float]
    grad_norm: float
    num_samples: int
    num_tokens: int
    num_places: int  # tokens, regions and their padding
    wait_seconds: float  # for data, averaged over ranks
    stop: bool


class _Run:
    def __init__(self, spec: TrainingSpec, environment: Environment, assembly: Assembly) -> None:
        self.spec = spec
        self.config = spec.training
        self.environment = environment
        self.assembly = assembly
        self.checkpoints = storage.join(spec.folder, CHECKPOINTS)
        self.is_first = environment.rank == 0

    def to_end(self) -> TrainingResult:
        damaged: list[str] = []
        with tempfile.TemporaryDirectory(prefix="sightline-") as cache:
            manifest, engine = self._start(Path(cache), damaged.append)
        start = manifest.step if manifest else 0
        with contextlib.ExitStack() as stack:
            stack.callback(engine.close)
            log = (
                stack.enter_context(MetricsLog(self.spec.folder, start)) if self.is_first else None
            )
            if log:
                self._log_start(log, engine, manifest, damaged)
            stopped_at = self._steps(engine, start, log)
            if stopped_at is not None:
                loss = self._last_loss() if self.is_first else math.nan
                return TrainingResult("stopped", stopped_at, self.config.steps, loss, None)
            return self._finish(engine, log)

    def _start(
        self, cache: Path, damaged: Callable[[str], None]
    ) -> tuple[checkpoint.Manifest | None, Engine]:
        """Builds the engine, from the newest whole checkpoint if there is one."""
        step = [-1]
        if self.is_first:
            checkpoint.remove_leftovers(self.checkpoints)
            found = checkpoint.newest(self.checkpoints, cache, damaged)
            step = [found.step if found else -1]
        dist.broadcast_object_list(step)
        module, config = self.assembly.module, self.config
        if step[0] < 0:
            return None, Engine(module, config, self.environment)
        location = storage.join(self.checkpoints, checkpoint.name_of(step[0]))
        manifest = checkpoint.read_manifest(location)
        _require_same(self.spec, manifest.sequence, location)
        read = checkpoint.reader(location, manifest, cache)
        return manifest, Engine(module, config, self.environment, manifest.step, read)

    def _steps(self, engine: Engine, start: int, log: MetricsLog | None) -> int | None:
        """Trains from `start` updates on; returns the step of a requested stop, or None."""
        config, environment = self.config, self.environment
        source = self.assembly.batches(start, environment.rank, environment.world_size)
        meter = _Meter()
        with Prefetch(source, config.prefetch_steps) as ahead:
            for step in range(start + 1, config.steps + 1):
                began = time.perf_counter()
                micro_batches = ahead.take()
                wait_seconds = time.perf_counter() - began
                torch.manual_seed(step_seed(self.spec.seed, step, environment.rank))
                rate = engine.learning_rate()
                losses, norm = engine.advance(
                    [batch.to(engine.device, engine.dtype) for batch in micro_batches]
                )
                figures = self._gather(step, micro_batches, losses, norm, wait_seconds)
                meter.add(figures)
                if log and (step % config.log_every_steps == 0 or step == config.steps):
                    log.step(meter.line(step, figures, rate))
                due = step % config.checkpoint_every_steps == 0 or step == config.steps
                if due or figures.stop:
                    self._save(engine, step, log)
                if figures.stop and step < config.steps:
                    if log:
                        log.event("stopped", step=step)
                    return step
        return None

    def _gather(
        self,
        step: int,
        micro_batches: Sequence[MicroBatch],
        losses: list[tuple[Tensor, Any]],
        norm: float,
        wait_seconds: float,
    ) -> _StepFigures:
        """Tells every rank what all of them did; raises TrainingError if a loss is not finite."""
        names = sorted(losses[0][1])
        means = (
            torch.stack(
                [torch.stack([loss, *(parts[name] for name in names)]) for loss, parts in losses]
            )
            .double()
            .mean(dim=0)
        )
        counts = [
            sum(batch.num_samples for batch in micro_batches),
            sum(batch.num_tokens for batch in micro_batches),
            sum(batch.num_places for batch in micro_batches),
            wait_seconds,
            self.is_first and storage.exists(storage.join(self.spec.folder, STOP)),
        ]
        mine = torch.cat([means, means.new_tensor(counts)])
        ranks = [torch.empty_like(mine) for _ in range(self.environment.world_size)]
        dist.all_gather(ranks, mine)
        table = torch.stack(ranks).cpu().numpy()  # (rank, figure)
        for rank, row in enumerate(table):
            for name, value in zip(["loss", *names], row, strict=False):
                if not math.isfinite(value):
                    raise TrainingError(self._not_finite(step, f"rank {rank}: {name} is {value}"))
        if not math.isfinite(norm):
            raise TrainingError(self._not_finite(step, f"the gradient's norm is {norm}"))
        average = table.mean(axis=0)
        sums = table[:, len(names) + 1 :].sum(axis=0)
        return _StepFigures(
            loss=float(average[0]),
            losses={name: float(mean) for name, mean in zip(names, average[1:], strict=False)},
            grad_norm=norm,
            num_samples=int(sums[0]),
            num_tokens=int(sums[1]),
            num_places=int(sums[2]),
            wait_seconds=float(sums[3]) / len(table),
            stop=bool(sums[4]),
        )

    def _not_finite(self, step: int, what: str) -> str:
        return (
            f"{self.spec.phase}, step {step}, {what}; try a lower learning_rate, a longer "
            "warm-up or precision=fp32, and start from the last checkpoint"
        )

    def _save(self, engine: Engine, step: int, log: MetricsLog | None) -> None:
        if log:
            log.flush()
        began = time.perf_counter()
        writer = checkpoint.Writer(
            sequence=self.spec.sequence(),
            zero_stage=self.config.zero_stage,
            precision=self.config.resolved_precision(self.environment.device),
        )
        checkpoint.save(self.checkpoints, step, engine.states(), writer)
        if log:
            checkpoint.prune(self.checkpoints, self.config.keep_checkpoints, step)
            log.event("checkpoint", step=step, seconds=round(time.perf_counter() - began, 3))

    def _finish(self, engine: Engine, log: MetricsLog | None) -> TrainingResult:
        """Writes the model folder and, last, the file that says the run is complete."""
        weights = engine.weights()
        if log:
            self.assembly.save(weights)
            steps = self.config.steps
            result = {"state": "finished", "step": steps, "steps": steps, "loss": self._last_loss()}
            document = {"sequence": self.spec.sequence(), "result": result}
            payload = json.dumps(document, indent=1, ensure_ascii=False).encode()
            storage.write_bytes(storage.join(self.spec.folder, RESULT), payload)
            log.event("finished", step=steps)
        dist.barrier()
        finished = finished_result(self.spec)
        assert finished is not None
        return replace(finished, already_finished=False)

    def _last_loss(self) -> float:
        return float(read_metrics(self.spec.folder)[-1]["loss"])

    def _log_start(
        self,
        log: MetricsLog,
        engine: Engine,
        manifest: checkpoint.Manifest | None,
        damaged: list[str],
    ) -> None:
        for reason in damaged:
            log.event("damaged-checkpoint", reason=reason)
        log.event(
            "resumed" if manifest else "started",
            step=manifest.step if manifest else 0,
            steps=self.config.steps,
            world_size=self.environment.world_size,
            device=self.environment.device,
            engine=engine.config,
        )


class _Meter:
    """Adds up steps until a line is logged."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._began = time.perf_counter()
        self._num_samples = 0
        self._num_tokens = 0
        self._wait_seconds = 0.0

    def add(self, figures: _StepFigures) -> None:
        self._num_samples += figures.num_samples
        self._num_tokens += figures.num_tokens
        self._wait_seconds += figures.wait_seconds

    def line(self, step: int, figures: _StepFigures, rate: float) -> dict[str, Any]:
        """Returns the line of a step: its own losses, and rates since the last line."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        line = {
            "step": step,
            "loss": figures.loss,
            "losses": figures.losses,
            "lr": rate,
            "grad_norm": figures.grad_norm,
            "padding_fraction": 1 - figures.num_tokens / max(figures.num_places, 1),
            "samples_per_second": round(self._num_samples / seconds, 3),
            "tokens_per_second": round(self._num_tokens / seconds, 3),
            "data_wait_fraction": round(self._wait_seconds / seconds, 4),
            "time": time.time(),
        }
        self._reset()
        return line


def _require_same(spec: TrainingSpec, sequence: dict[str, Any], where: str) -> None:
    found = checkpoint.differences(spec.sequence(), sequence)
    if found:
        raise CheckpointError(
            f"{where} belongs to another run; it differs in {'; '.join(found)}. "
            "Remove the folder, or choose another"
        )


@contextlib.contextmanager
def _only_writer(folder: str) -> Iterator[None]:
    """Keeps every other process out of a run's folder; the lock ends with this process.

    Waits a while first: the workers of a killed driver live a few seconds longer than it does.
    """
    path = storage.local_path(folder)
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + SECONDS_TO_WAIT_FOR_LOCK
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TrainingError(f"{folder}: another process is training here") from None
                time.sleep(0.2)
            except OSError as error:
                raise StorageError(f"{folder}: cannot be locked: {error}") from error
        yield
    finally:
        os.close(descriptor)
