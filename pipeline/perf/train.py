"""`sightline bench train`: what a run's step, start, second rank and checkpoint cost."""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from rich.console import Console

from pipeline import config, storage
from pipeline.cluster import ClusterConfig
from pipeline.config import Config
from pipeline.errors import TrainingError
from pipeline.perf import measure
from pipeline.perf.measure import Times
from pipeline.perf.result import Comparison, Result
from pipeline.perf.steps import BARE, MARKS, OURS, Marked
from pipeline.recipe import Recipe
from pipeline.stages import extract, ingest
from pipeline.stages.data_inputs import DataInputs
from pipeline.stages.phase_spec import phase_specs
from pipeline.stages.progress import StageProgress
from pipeline.training.launch.launch import launch_all
from pipeline.training.spec import TrainingSpec

Seconds = tuple[float, float]  # by the wall's clock, and of CPU time

STAGES = (0, 1)
STEPS_PER_TURN = 5  # of the run, and then of the bare loop
WARM_UP_STEPS = 3
CHECKPOINT_EVERY = 8

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "scenes": 40,
        "batch_size": 4,
        "model": {"width": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 24},
    },
    # on one core of a CPU, a step of half a second and more
    "small": {
        "scenes": 400,
        "batch_size": 32,
        "model": {"width": 256, "num_layers": 4, "num_heads": 4, "intermediate_size": 1024},
    },
    "base": {"scenes": 400, "batch_size": 16, "model": {}},  # BERT's
}


class TrainBenchConfig(Config):
    """What is measured and how often."""

    size: Literal["tiny", "small", "base"] = "small"
    rounds: PositiveInt = 6  # turns of each contestant


def run(settings: TrainBenchConfig, show: Callable[[Comparison], None]) -> Result:
    """Measures on the CPU, on data that it ingests; `show` is given each comparison when made."""
    machine = measure.machine(torch.device("cpu"))
    comparisons = []
    with tempfile.TemporaryDirectory(prefix="sightline-bench-") as folder:
        bench = _Bench(settings, Path(folder))
        for comparison in bench.comparisons():
            show(comparison)
            comparisons.append(comparison)
    machine["load after"] = measure.machine(torch.device("cpu"))["load"]
    return Result("train", settings.model_dump(mode="json"), machine, comparisons)


class _Bench:
    """One dataset and the runs on it; ranks have one thread each, so that CPU time is work."""

    def __init__(self, settings: TrainBenchConfig, folder: Path) -> None:
        self._rounds = settings.rounds
        self._size = SIZES[settings.size]
        self._folder = folder
        self._recipe = self._recipe_of(workers=1)
        quiet = Console(stderr=True, quiet=True)
        for stage in (ingest, extract):
            with StageProgress(quiet, stage.__name__) as progress:
                stage.run(self._recipe, progress)
        inputs = DataInputs.open(self._recipe)
        self._spec = phase_specs(self._recipe, inputs)[0]

    def comparisons(self) -> Iterator[Comparison]:
        yield from self._against_bare()
        yield self._start_up()
        yield from self._scaling_and_checkpoints()

    def _against_bare(self) -> Iterator[Comparison]:
        turns = self._rounds + 1  # the first is not counted
        specs = [
            self._variant(f"zero-{stage}", steps=turns * STEPS_PER_TURN + 1, zero_stage=stage)
            for stage in STAGES
        ]
        cluster = ClusterConfig(workers=1)
        launch_all(specs, cluster, _quietly, Marked(bare_steps=STEPS_PER_TURN))
        for stage, spec in zip(STAGES, specs, strict=True):
            rounds = _marks(spec)[2:]
            wall, cpu = (
                Times(
                    {
                        name: tuple(one[name][clock] / STEPS_PER_TURN for one in rounds)
                        for name in (BARE, OURS)
                    }
                )
                for clock in (0, 1)
            )
            by_cpu = _paired(cpu)
            yield Comparison.of(
                f"a step of training with ZeRO {stage} and of a bare torch loop, one rank",
                wall,
                columns={
                    "CPU ms": {name: f"{1000 * cpu.median(name):,.1f}" for name in (BARE, OURS)}
                },
                notes=[
                    f"by CPU time, turn by turn: {by_cpu:.3f} of the bare loop's throughput; by "
                    f"the wall's clock {_paired(wall):.3f}, which other processes disturb"
                ],
                figures={"cpu_ratio": by_cpu, "wall_ratio": _paired(wall)},
            )

    def _start_up(self) -> Comparison:
        recipe = self._recipe_of(workers=1, run="start-up", steps=1)
        location, output = self._folder / "start-up.yaml", self._folder / "start-up.json"
        location.write_text(config.to_yaml(recipe))
        began = time.time()
        module = "pipeline.perf.start_up"
        command = [sys.executable, "-m", module, str(location), str(output)]
        package = Path(__file__).parents[2]  # not the working folder, whose modules come first
        ended = subprocess.run(command, cwd=package, capture_output=True, text=True, check=False)
        if ended.returncode:
            last = ended.stderr.strip().splitlines()[-1:]
            raise TrainingError(f"bench train: {module} failed: {' '.join(last)}")
        done = {"": began, **json.loads(output.read_text())}
        times = list(done.values())
        parts = {
            name: after - before
            for name, before, after in zip(list(done)[1:], times[:-1], times[1:], strict=True)
        }
        whole = times[-1] - began
        return Comparison.of(
            "start of a run on one Ray worker",
            Times({"from command to first step": (whole,)}),
            notes=[f"{name}: {seconds:.1f} s" for name, seconds in parts.items()],
            figures={"whole": whole, **parts},
        )

    def _scaling_and_checkpoints(self) -> Iterator[Comparison]:
        """Each rank has as many samples a step, with one rank and with two."""
        size = self._spec.training.global_batch_size
        steps = CHECKPOINT_EVERY * (1 + self._rounds) + 1
        plain = self._variant("one-rank", steps=steps)
        saving = self._variant("saving", steps=steps, checkpoints={"every_steps": CHECKPOINT_EVERY})
        both = self._variant("two-ranks", steps=steps, global_batch_size=2 * size)
        waited: list[float] = []

        def follow(line: dict[str, Any]) -> None:
            if line.get("event") == "checkpoint" and line["step"] % CHECKPOINT_EVERY == 0:
                waited.append(line["seconds_waited"])

        launch_all([plain, saving], ClusterConfig(workers=1), follow, Marked())
        launch_all([both], ClusterConfig(workers=2), _quietly, Marked())
        one, two = f"1 rank, {size} samples", f"2 ranks, {2 * size} samples"
        yield _weak_scaling({one: [_steps(plain, 0)], two: [_steps(both, 0), _steps(both, 1)]})
        names = ("without checkpoints", f"a checkpoint each {CHECKPOINT_EVERY} steps")
        yield _with_checkpoints(
            dict(zip(names, (_steps(plain, 0), _steps(saving, 0)), strict=True)), waited
        )

    def _variant(self, phase: str, **training: Any) -> TrainingSpec:
        rarely = {"checkpoints": {"every_steps": 10**6}}
        settings = {**self._spec.training.model_dump(), **rarely, **training}
        return self._spec.model_copy(
            update={
                "phase": phase,
                "folder": str(self._folder / "runs" / phase),
                "training": type(self._spec.training).model_validate(settings),
            }
        )

    def _recipe_of(self, workers: int, run: str = "run", steps: int = 100) -> Recipe:
        batch_size = self._size["batch_size"]
        training = {
            "steps": steps,
            "global_batch_size": batch_size,
            "micro_batch_size": batch_size,
        }
        document = {
            "name": "bench",
            "run": str(self._folder / run),
            "dataset": {
                "path": str(self._folder / "data"),
                "source": {
                    "type": "shapes",
                    "scenes": self._size["scenes"],
                    "validation_scenes": 12,
                    "image_size": 96,
                },
            },
            # as many regions as a detector gives
            "features": {"extractor": {"type": "pixels", "image_size": 96, "patch_size": 16}},
            "model": {"family": "visualbert", "vocab_size": 400, "max_tokens": 32}
            | {"sizes": self._size["model"]},
            "objectives": {"mlm": {}, "itm": {}},
            "training": {"pretrain": training, "finetune": training, "blind_twin": False},
            "benchmarks": {"vqa": {}},
            "cluster": {"workers": workers},
        }
        return config.check(Recipe, document, "bench train")


def _weak_scaling(steps: Mapping[str, Sequence[Sequence[Seconds]]]) -> Comparison:
    """Compares steps of one rank with those of each of two."""
    one, two = steps
    wall = Times(
        {name: tuple(w for w, _ in ranks[0][WARM_UP_STEPS:]) for name, ranks in steps.items()}
    )
    cpu = Times(
        {
            name: tuple(cpu for rank in ranks for _, cpu in rank[WARM_UP_STEPS:])
            for name, ranks in steps.items()
        }
    )
    return Comparison.of(
        "weak scaling: as many samples a rank",
        wall,
        columns={"CPU ms a rank": {n: f"{1000 * cpu.median(n):,.1f}" for n in (one, two)}},
        notes=[
            f"efficiency {wall.ratio(one, two):.3f} by the wall's clock, "
            f"{cpu.ratio(one, two):.3f} by a rank's CPU time, which waiting does not count"
        ],
        figures={"efficiency": wall.ratio(one, two), "cpu_efficiency": cpu.ratio(one, two)},
    )


def _with_checkpoints(steps: Mapping[str, Sequence[Seconds]], waited: list[float]) -> Comparison:
    """Counts all that a checkpoint costs until the next: the copy, and writing it beside."""
    plain, saving = steps
    cycles = {
        name: [
            [sum(clock) for clock in zip(*taken[start : start + CHECKPOINT_EVERY], strict=True)]
            for start in range(
                CHECKPOINT_EVERY - 1, len(taken) - CHECKPOINT_EVERY + 1, CHECKPOINT_EVERY
            )
        ]
        for name, taken in steps.items()
    }
    wall, cpu = (
        Times({name: tuple(cycle[clock] for cycle in of) for name, of in cycles.items()})
        for clock in (0, 1)
    )
    stood_still = statistics.median(waited)
    lost = cpu.median(saving) - cpu.median(plain)
    return Comparison.of(
        f"{CHECKPOINT_EVERY} steps, with a checkpoint and without",
        wall,
        columns={"CPU ms": {n: f"{1000 * cpu.median(n):,.1f}" for n in (plain, saving)}},
        notes=[
            f"training stood still for {stood_still:.2f} s a checkpoint, which took "
            f"{lost:.2f} s of CPU time in all, most of it beside"
        ],
        figures={"seconds_waited": stood_still, "cpu_seconds": lost},
    )


def _marks(spec: TrainingSpec, rank: int = 0) -> list[dict[str, Any]]:
    text = storage.read_bytes(storage.join(spec.folder, MARKS.format(rank=rank)))
    return [json.loads(line) for line in text.splitlines()]


def _steps(spec: TrainingSpec, rank: int) -> list[Seconds]:
    """Returns wall and CPU seconds from the beginning of each step to that of the next."""
    begun = [(mark["wall"], mark["cpu"]) for mark in _marks(spec, rank)[1:]]
    return [
        (after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(begun)
    ]


def _paired(times: Times) -> float:
    """Returns the median over the rounds of ours against the bare loop in the same round."""
    pairs = zip(times.rounds[BARE], times.rounds[OURS], strict=True)
    return statistics.median(bare / ours for bare, ours in pairs)


def _quietly(_line: dict[str, Any]) -> None:
    """Nobody watches the runs of a bench."""
