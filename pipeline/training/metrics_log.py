"""A step's figures to a line that survives the process: metrics.jsonl, and events.jsonl.

metrics.jsonl is a function of the run: but for the times and rates, the lines after any number
of interruptions are those of an unbroken run. events.jsonl tells what happened on the way.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pipeline import storage
from pipeline.errors import StorageError

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"


class MetricsLog:
    """The writer of a run's figures: rank 0 opens it, at the step that the run continues from.

    Lines of later steps are cut off: those steps will be made again. A line is handed to the
    operating system whole, so that a killed process leaves at most one torn line, the last.
    """

    def __init__(self, folder: str, step: int) -> None:
        root = _local(folder)
        root.mkdir(parents=True, exist_ok=True)
        metrics, events = root / METRICS, root / EVENTS
        metrics.touch()
        os.truncate(metrics, _size_up_to(metrics, step))
        if events.exists():
            os.truncate(events, _size_of_lines(events))
        self._metrics = os.open(metrics, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._events = os.open(events, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._metrics)
        os.close(self._events)

    def step(self, line: Mapping[str, Any]) -> None:
        """Appends a step's figures."""
        _append(self._metrics, line)

    def event(self, event: str, **facts: Any) -> None:
        """Appends what happened, with the time."""
        _append(self._events, {"event": event, "time": time.time(), **facts})

    def flush(self) -> None:
        """Returns when all lines are on the disk: before a checkpoint that comes after them."""
        os.fsync(self._metrics)


def read_metrics(folder: str) -> list[dict[str, Any]]:
    """Returns the steps' figures; a torn last line is left out."""
    path = _local(folder) / METRICS
    if not path.exists():
        return []
    return [line for line, _ in _lines(path)]


class Follower:
    """Reads the lines that a run appends to one of its logs, while it runs."""

    def __init__(self, folder: str, name: str) -> None:
        """Starts after the lines that are there already."""
        self._path = _local(folder) / name
        self._offset = self._path.stat().st_size if self._path.exists() else 0

    def new_lines(self) -> list[dict[str, Any]]:
        """Returns the whole lines appended since the last call."""
        if not self._path.exists():
            return []
        if self._path.stat().st_size < self._offset:  # cut back by a run that continues
            self._offset = self._path.stat().st_size
        with self._path.open("rb") as file:
            file.seek(self._offset)
            appended = file.read()
        whole = appended[: appended.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = []
        for line in whole.splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                # The log was cut back and outgrew our place in it within one look; what is
                # missed here is shown late, and is in the log.
                continue
        return lines


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yields each whole line with the offset after it, up to a torn one; raises StorageError."""
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                return
            offset += len(raw)
            try:
                line = json.loads(raw)
            except ValueError as error:
                raise StorageError(f"{path}, line {number}: not JSON: {error}") from error
            yield line, offset


def _size_up_to(path: Path, step: int) -> int:
    size_bytes = 0
    for line, end in _lines(path):
        if line["step"] > step:
            break
        size_bytes = end
    return size_bytes


def _size_of_lines(path: Path) -> int:
    return max((end for _, end in _lines(path)), default=0)


def _append(descriptor: int, line: Mapping[str, Any]) -> None:
    os.write(descriptor, json.dumps(line, ensure_ascii=False).encode() + b"\n")


def _local(folder: str) -> Path:
    return storage.local_path(folder)
