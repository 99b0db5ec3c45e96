"""Live progress of a stage, on stderr: a bar on a terminal, a line now and then in a log."""

import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 15.0  # in a log; a terminal is redrawn


class StageProgress:
    """Shows how far one stage is. `update` may be called from any thread, as often as one likes."""

    def __init__(self, console: Console, stage: str) -> None:
        self._console = console
        self._stage = stage
        self._live = console.is_terminal
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description:<9}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
            transient=True,
        )
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        if self._live:
            self._bar.start()
        self._begin(self._stage)
        return self

    def update(self, done: int, total: int, figures: str = "", phase: str = "") -> None:
        """Shows `done` of `total` units and a short text of figures, as `loss 1.23`."""
        name = phase or self._stage
        if name != self._name:
            self._bar.remove_task(self._row)  # its clock and pace are not those of the next phase
            self._begin(name)
        self._bar.update(self._row, completed=done, total=total, figures=figures)
        now = time.monotonic()
        if not self._live and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = self._bar.tasks[0].time_remaining
            when = "" if left is None else f"  left {timedelta(seconds=round(left))}"
            self._console.print(f"{name}: {done}/{total}  {figures}{when}", highlight=False)

    def _begin(self, name: str) -> None:
        self._name = name
        self._row = self._bar.add_task(name, total=None, figures="")

    def note(self, text: str) -> None:
        """Leaves a line above the bar."""
        self._console.print(text, style="dim", highlight=False)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._bar.stop()
