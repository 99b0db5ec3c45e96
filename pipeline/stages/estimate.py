"""The estimate of a training: what `sightline check` has found, as it is told."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.training.spec import RankContext

STAGES = (0, 1, 2, 3)
GB = 1e9
WAIT_WORTH_TELLING = 0.1


@dataclass(frozen=True)
class Machine:
    """What a rank has. None is unknown."""

    device: str  # of the recipe: cpu or cuda
    name: str
    bytes_per_rank: int | None
    workers: int

    @property
    def rank(self) -> RankContext:
        """One of its ranks."""
        return RankContext(0, self.workers, 0, self.device)


@dataclass(frozen=True)
class Data:
    """What one phase reads. `examples` and `epochs` are by kind of text."""

    samples: int
    shards: int
    examples: Mapping[str, int]
    epochs: Mapping[str, float]


@dataclass(frozen=True)
class Measured:
    """What a few real steps have shown."""

    seconds_per_step: float
    data_wait_fraction: float
    tokens_per_sample: float  # real tokens and regions
    checkpoint_seconds: float  # to write one, while training goes on


@dataclass(frozen=True)
class Phase:
    """What one phase will take. None is unknown; stages are ZeRO's, None where refused."""

    name: str
    steps: int
    samples_per_step: int
    accumulation_steps: int
    zero_stage: int
    precision: str
    parameters: int
    trained_parameters: int
    state_bytes: Mapping[str, int | None]  # by stage, on the device
    offloaded_bytes: int  # in the host's memory
    swapped_bytes: int  # in files
    checkpoint_bytes: int
    activation_bytes: int | None = None  # of one micro-batch, kept from forward to backward
    data: Data | None = None
    measured: Measured | None = None

    @property
    def hours(self) -> float | None:
        if self.measured is None:
            return None
        return self.steps * self.measured.seconds_per_step / 3600

    def bytes_at(self, stage: int) -> int | None:
        """Returns all that a rank's device holds at a stage, as far as it is known."""
        found = self.state_bytes[str(stage)]
        return None if found is None else found + (self.activation_bytes or 0)


@dataclass(frozen=True)
class Report:
    """What `sightline check` has found; a recipe that cannot be run has raised instead."""

    recipe: str
    machine: Machine
    phases: tuple[Phase, ...]
    unknown: tuple[str, ...]
    advice: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        phases = [{**asdict(phase), "hours": phase.hours} for phase in self.phases]
        return {**asdict(self), "phases": phases}

    def print(self, output: Console) -> None:
        for phase in self.phases:
            output.print(_memory_table(self.machine, phase))
            for line in _lines(phase):
                output.print(f"  {line}", highlight=False, soft_wrap=True)
            output.print()
        hours = [phase.hours for phase in self.phases if phase.hours is not None]
        if len(hours) == len(self.phases):
            output.print(
                f"Training takes about {_duration(sum(hours))} on this machine as it is now."
            )
        for reason in self.unknown:
            output.print(f"Unknown: {reason}", style="yellow", highlight=False, soft_wrap=True)
        for line in self.advice:
            output.print(f"Note: {line}", highlight=False, soft_wrap=True)


def _memory_table(machine: Machine, phase: Phase) -> Table:
    has = machine.bytes_per_rank
    limit = "" if has is None else f" of {has / GB:.1f} GB"
    table = Table(
        title=f"{phase.name}: GB a rank holds{limit}", title_justify="left", title_style="bold"
    )
    table.add_column("ZeRO stage")
    for column in ("weights, gradients, optimizer", "activations", "together", "fits"):
        table.add_column(column, justify="right")
    for stage in STAGES:
        state, together = phase.state_bytes[str(stage)], phase.bytes_at(stage)
        chosen = " ← the recipe's" if stage == phase.zero_stage else ""
        if state is None or together is None:
            table.add_row(f"{stage}{chosen}", f"not in {phase.precision}", "", "", "")
            continue
        kept = phase.activation_bytes
        fits = "?" if has is None else "yes" if together <= has else "no"
        table.add_row(
            f"{stage}{chosen}",
            f"{state / GB:.3f}",
            "?" if kept is None else f"{kept / GB:.3f}",
            f"{together / GB:.3f}",
            fits,
        )
    return table


def _lines(phase: Phase) -> Iterator[str]:
    frozen = phase.parameters - phase.trained_parameters
    yield (
        f"{phase.parameters:,} parameters{f', {frozen:,} of them frozen' if frozen else ''}, "
        f"{phase.precision}; a checkpoint is {phase.checkpoint_bytes / GB:.3f} GB"
    )
    if phase.offloaded_bytes:
        yield f"{phase.offloaded_bytes / GB:.3f} GB a rank lie outside the device"
    if phase.swapped_bytes:
        yield f"{phase.swapped_bytes / GB:.3f} GB a rank lie in swap files"
    if phase.data is not None:
        examples = ", ".join(
            f"{number:,} {kind} ({phase.data.epochs[kind]:g} epochs)"
            for kind, number in phase.data.examples.items()
        )
        yield f"{phase.data.samples:,} samples in {phase.data.shards:,} shards: {examples}"
    steps = (
        f"{phase.steps:,} steps of {phase.samples_per_step:,} samples, "
        f"{phase.accumulation_steps} micro-batches a rank"
    )
    measured = phase.measured
    if measured is None or phase.hours is None:
        yield steps
        return
    tokens = measured.tokens_per_sample * phase.samples_per_step * phase.steps
    yield f"{steps}: {tokens:,.0f} tokens and regions"
    yield (
        f"{1000 * measured.seconds_per_step:,.0f} ms a step ({measured.data_wait_fraction:.0%} "
        f"waiting for data), {measured.checkpoint_seconds:.1f} s to write a checkpoint beside: "
        f"{_duration(phase.hours)}"
    )


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
