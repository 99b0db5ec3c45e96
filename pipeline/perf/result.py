"""Measured figures, as a table for people or as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.perf.measure import Times


@dataclass(frozen=True)
class Comparison:
    """Contestants that do the same work, each against the first, which is the reference."""

    title: str
    seconds: Mapping[str, float]  # medians
    ratios: Mapping[str, float]  # reference's time by the contestant's
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # further, by contestant
    notes: Sequence[str] = ()
    figures: Mapping[str, float] = field(default_factory=dict)  # what the notes say, as numbers

    @classmethod
    def of(cls, title: str, times: Times, **more: Any) -> "Comparison":
        """Compares every contestant with the first."""
        names = list(times.rounds)
        return cls(
            title,
            {name: times.median(name) for name in names},
            {name: times.ratio(names[0], name) for name in names},
            **more,
        )

    def print(self, output: Console) -> None:
        """Draws a table, its notes below it."""
        table = Table(title=self.title, title_justify="left")
        table.add_column("", no_wrap=True)
        table.add_column("ms", justify="right")
        table.add_column("times as fast", justify="right")
        for column in self.columns:
            table.add_column(column, justify="right")
        for name, seconds in self.seconds.items():
            further = [cells.get(name, "") for cells in self.columns.values()]
            ratio = f"{self.ratios[name]:.2f}"
            table.add_row(name, f"{1000 * seconds:,.1f}", ratio, *further)
        output.print(table)
        for note in self.notes:
            output.print(f"  {note}", highlight=False, soft_wrap=True)
        output.print()


@dataclass(frozen=True)
class Figure:
    """One number that was measured, and the one it is to stay under."""

    name: str
    found: float
    goal: float
    unit: str = ""
    smaller: float | None = None  # the same of a dataset of a tenth of the size

    @property
    def growth(self) -> float | None:
        """How many times the smaller dataset's it is."""
        return self.found / self.smaller if self.smaller else None


@dataclass(frozen=True)
class Goals:
    """Figures, each beside its goal."""

    title: str
    figures: Sequence[Figure]
    notes: Sequence[str] = ()

    def print(self, output: Console) -> None:
        """Draws a table, its notes below it."""
        table = Table(title=self.title, title_justify="left")
        table.add_column("")
        for column in ("found", "a tenth of the size", "growth", "goal", "of the goal"):
            table.add_column(column, justify="right")
        for figure in self.figures:
            smaller = "" if figure.smaller is None else f"{figure.smaller:,.2f}"
            table.add_row(
                figure.name,
                f"{figure.found:,.2f} {figure.unit}",
                smaller,
                "" if figure.growth is None else f"{figure.growth:.2f}",
                f"≤ {figure.goal:,g} {figure.unit}",
                f"{figure.found / figure.goal:.0%}",
            )
        output.print(table)
        for note in self.notes:
            output.print(f"  {note}", highlight=False, soft_wrap=True)
        output.print()


@dataclass(frozen=True)
class Result:
    """What one bench found."""

    bench: str
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    comparisons: Sequence[Comparison]
    goals: Goals | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def made_with(self) -> str:
        """Says in a line how and where the figures were found."""
        about = {**self.settings, **self.machine}
        return ", ".join(f"{name} {value}" for name, value in about.items() if value is not None)
