"""Step times of a run, beside those of a bare torch loop on the same batches.

It goes into a run as what assembles it: the model, the batches and the loop are the run's own.
"""

import copy
import json
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.training.assembly import Assembly, assemble
from pipeline.training.config import TrainingConfig
from pipeline.training.engine.optimizer import build_optimizer
from pipeline.training.feed.micro_batch import MicroBatch
from pipeline.training.spec import TrainingSpec

MARKS = "marks-{rank}.jsonl"  # in the phase's folder
OURS, BARE = "ours", "bare"


@dataclass(frozen=True)
class Marked:
    """Assembles a run whose ranks write down when each step begins.

    The clocks are the wall's and that of this process's CPU time, all threads together. With
    `bare_steps`, the run stands still after as many steps, and a bare loop makes as many of its
    own on the batches that were just trained on.
    """

    bare_steps: int = 0

    def __call__(self, spec: TrainingSpec) -> Assembly:
        called = time.time()
        assembly = assemble(spec)
        marks = _Marks(spec, called)
        bare = _BareLoop(assembly.module, spec.training) if self.bare_steps else None

        def batches(
            start: int, rank: int, world_size: int
        ) -> Generator[Sequence[MicroBatch], None, None]:
            pause = _Pause(marks, bare, self.bare_steps, rank)
            for step in assembly.batches(start, rank, world_size):
                pause.running.wait()  # what is read ahead while the bare loop runs is not its cost
                yield [
                    _Told(batch, pause.reached if first else _nothing, pause.keep)
                    for first, batch in zip([True] + [False] * len(step), step, strict=False)
                ]

        return replace(assembly, batches=batches, flops=None)  # which a _Told does not tell


@dataclass(frozen=True)
class _Told:
    """A micro-batch that tells when it is taken."""

    batch: MicroBatch
    before: Callable[[], None]
    after: Callable[[Any], None]

    @property
    def num_samples(self) -> int:
        return self.batch.num_samples

    @property
    def num_tokens(self) -> int:
        return self.batch.num_tokens

    @property
    def num_tokens_with_padding(self) -> int:
        return self.batch.num_tokens_with_padding

    def to(self, device: torch.device, dtype: torch.dtype) -> Any:
        self.before()
        moved = self.batch.to(device, dtype)
        self.after(moved)
        return moved


class _Marks:
    """The file of what was timed."""

    def __init__(self, spec: TrainingSpec, called: float) -> None:
        self._folder = Path(spec.folder)
        self._assembled = {"called": called, "assembled": time.time()}

    def open(self, rank: int) -> None:
        self._path = self._folder / MARKS.format(rank=rank)
        self._path.unlink(missing_ok=True)
        self.write(self._assembled)

    def write(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class _Pause:
    """Where a run stands still at the start of a step, so that the bare loop can have its turn."""

    def __init__(self, marks: _Marks, bare: "_BareLoop | None", every: int, rank: int) -> None:
        self.running = threading.Event()
        self.running.set()
        self._marks, self._bare, self._every = marks, bare, every
        self._seen: list[Any] = []
        self._steps = 0
        self._began = _now()
        marks.open(rank)

    def reached(self) -> None:
        """Is called as a step begins, its data at hand."""
        if self._bare is None:
            wall, cpu = _now()
            self._marks.write({"begun": self._steps, "wall": wall, "cpu": cpu})
        elif self._steps and self._steps % self._every == 0:
            ours = _since(self._began)
            self.running.clear()
            began = _now()
            self._bare.train(self._seen)
            self._marks.write({OURS: ours, BARE: _since(began), "steps": self._every})
            self._seen.clear()
            self.running.set()
        self._steps += 1
        if self._seen == []:
            self._began = _now()

    def keep(self, batch: Any) -> None:
        if self._bare is not None:
            self._seen.append(batch)


class _BareLoop:
    """What one would write without any of this: forward, backward, clip, update."""

    def __init__(self, module: nn.Module, config: TrainingConfig) -> None:
        self._module = copy.deepcopy(module)
        self._optimizer = build_optimizer(self._module, config.optimizer)
        self._clip_norm = config.optimizer.clip_norm
        self._accumulation = config.accumulation_steps(1)

    def train(self, batches: Sequence[Any]) -> None:
        for start in range(0, len(batches), self._accumulation):
            self._optimizer.zero_grad()
            for batch in batches[start : start + self._accumulation]:
                loss, _ = self._module(batch)
                (loss / self._accumulation).backward()
            nn.utils.clip_grad_norm_(self._module.parameters(), self._clip_norm)
            self._optimizer.step()


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(began: tuple[float, float]) -> list[float]:
    return [after - before for before, after in zip(began, _now(), strict=True)]


def _nothing() -> None:
    """The micro-batches of a step after its first."""
