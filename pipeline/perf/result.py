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
class Result:
    """What one bench found."""

    bench: str
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    comparisons: Sequence[Comparison]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def made_with(self) -> str:
        """Says in a line how and where the figures were found."""
        about = {**self.settings, **self.machine}
        return ", ".join(f"{name} {value}" for name, value in about.items() if value is not None)
