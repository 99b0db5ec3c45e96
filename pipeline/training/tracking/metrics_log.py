"""The logs of a phase, which survive the process: metrics.jsonl and events.jsonl.

metrics.jsonl is a function of the run: but for the times and rates, the lines after any number
of interruptions are those of an unbroken run. Where a run went on with other settings there is a
line of its own, with `event` instead of a loss: the beginning of a new stretch. events.jsonl tells
what happened on the way.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

from pipeline import storage
from pipeline.errors import StorageError

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"

SECONDS_BETWEEN_WRITES = 5.0  # to an object store, and a second more for each megabyte

STRETCH = "stretch"


@dataclass(frozen=True)
class Stretch:
    """A part of a run's curve that has settings of its own."""

    step: int  # the last one before it
    changed: dict[str, tuple[Any, Any]]  # the recipe's key -> its value before, and from here on
    dataset_version: int
    time: float  # when it began, in seconds since 1970

    @classmethod
    def of_line(cls, line: Mapping[str, Any]) -> Self:
        """Returns what a line of metrics.jsonl with an `event` tells."""
        changed = {key: (old, new) for key, (old, new) in line["changed"].items()}
        return cls(line["step"], changed, line["dataset_version"], line["time"])

    def described(self) -> str:
        """Returns what changed and how, in words."""
        return "; ".join(
            f"{key}: {json.dumps(old)} → {json.dumps(new)}"
            for key, (old, new) in self.changed.items()
        )


@dataclass(frozen=True)
class Recorded:
    """What metrics.jsonl holds."""

    steps: tuple[Mapping[str, Any], ...]  # each step's figures
    stretches: tuple[Stretch, ...]  # where the run went on with other settings, in order
    is_cut_short: bool  # the last line is torn, and left out

    @classmethod
    def read(cls, folder: str) -> Self:
        """Raises StorageError naming a line that is damaged."""
        location = storage.join(folder, METRICS)
        payload = _payload(location)
        steps, stretches = [], []
        for number, (line, _) in enumerate(_lines(location, payload), start=1):
            try:
                if "event" in line:
                    stretches.append(Stretch.of_line(line))
                else:
                    steps.append({**line, "step": int(line["step"])})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise _damaged(location, number, f"not a step's figures: {line}") from error
        return cls(tuple(steps), tuple(stretches), payload[-1:] not in (b"", b"\n"))


class MetricsLog:
    """The writer of a run's figures: rank 0 opens it, at the step that the run continues from.

    Lines of later steps are cut off: those steps will be made again. So is the beginning of a
    stretch at this very step, as its checkpoint is still of the one before. On a disk, a line is
    handed to the operating system whole, so that a killed process leaves at most one torn line,
    the last. In an object store nothing can be appended to: there the log is written anew every
    few seconds, and a killed process takes its last lines with it; none from before a `flush`.

    With other settings, in the stretch that then begins, they will not be made again: there the
    log is first copied whole, to `metrics.replaced-1.jsonl` or the next number.
    """

    def __init__(self, folder: str, step: int, begins: Stretch | None = None) -> None:
        metrics, events = (storage.join(folder, name) for name in (METRICS, EVENTS))
        if begins is not None and _has_other_steps(folder, begins):
            _copy(metrics)
        kept = (
            end
            for line, end in _lines(metrics, _payload(metrics))
            if line["step"] < step + ("event" not in line)
        )
        self._metrics = _open(metrics, max(kept, default=0))
        self._events = _open(
            events, max((end for _, end in _lines(events, _payload(events))), default=0)
        )
        if begins is not None:
            self._metrics.append(_encoded({"event": STRETCH, **asdict(begins)}))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()
        self._events.close()

    def step(self, line: Mapping[str, Any]) -> None:
        """Appends a step's figures."""
        self._metrics.append(_encoded(line))

    def event(self, event: str, **facts: Any) -> None:
        """Appends what happened, with the time."""
        self._events.append(_encoded({"event": event, "time": time.time(), **facts}))

    def flush(self) -> None:
        """Returns when all lines are on the disk: before a checkpoint that comes after them."""
        self._metrics.flush()


def _has_other_steps(folder: str, begins: Stretch) -> bool:
    """Whether there are steps after it with other settings than its own."""
    before = [one for one in read_stretches(folder) if one.step == begins.step]
    if before and before[-1].changed == begins.changed:
        return False
    return any(line["step"] > begins.step for line in read_metrics(folder))


def _copy(metrics: str) -> None:
    number = 1
    while not storage.create(
        f"{metrics.removesuffix('.jsonl')}.replaced-{number}.jsonl", storage.read_bytes(metrics)
    ):
        number += 1


def read_metrics(folder: str) -> list[Mapping[str, Any]]:
    """Returns the steps' figures; a torn last line is left out."""
    return list(Recorded.read(folder).steps)


def read_stretches(folder: str) -> list[Stretch]:
    """Returns where the run went on with other settings, in order."""
    return list(Recorded.read(folder).stretches)


def last_loss(folder: str) -> float:
    """Returns the loss of the last step with figures; NaN if there is none."""
    lines = read_metrics(folder)
    return float(lines[-1]["loss"]) if lines else math.nan


def read_events(folder: str) -> list[dict[str, Any]]:
    """Returns what happened on the way, in order; a torn last line is left out."""
    events = storage.join(folder, EVENTS)
    return [line for line, _ in _lines(events, _payload(events))]


class Follower:
    """Reads the lines that a run appends to one of its logs, while it runs."""

    def __init__(self, folder: str, name: str) -> None:
        """Starts after the lines that are there already."""
        self._location = storage.join(folder, name)
        self._offset = self._size_bytes()

    def new_lines(self) -> list[dict[str, Any]]:
        """Returns the whole lines appended since the last call."""
        size_bytes = self._size_bytes()
        self._offset = min(self._offset, size_bytes)  # cut back by a run that continues
        if size_bytes == self._offset:
            return []
        try:
            appended = storage.read_range(self._location, self._offset, size_bytes - self._offset)
        except StorageError:  # cut back since its size was asked for; the next call sees that
            return []
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

    def _size_bytes(self) -> int:
        status = storage.file_status(self._location)
        return status.size_bytes if status else 0


class _Log(Protocol):
    def append(self, line: bytes) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class _LocalLog:
    def __init__(self, location: str, size_bytes: int) -> None:
        path = storage.local_path(location)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.truncate(path, size_bytes)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def append(self, line: bytes) -> None:
        os.write(self._descriptor, line)

    def flush(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


class _StoredLog:
    def __init__(self, location: str, size_bytes: int) -> None:
        self._location = location
        kept = storage.read_bytes(location)[:size_bytes] if size_bytes else b""
        self._payload = bytearray(kept)
        self._write()

    def append(self, line: bytes) -> None:
        self._payload += line
        self._is_written = False
        if time.monotonic() > self._due:
            self._write()

    def flush(self) -> None:
        if not self._is_written:
            self._write()

    def close(self) -> None:
        self.flush()

    def _write(self) -> None:
        storage.write_bytes(self._location, bytes(self._payload))
        self._is_written = True
        self._due = time.monotonic() + SECONDS_BETWEEN_WRITES + len(self._payload) / 1e6


def _open(location: str, size_bytes: int) -> _Log:
    """Opens a log for appending after its first bytes."""
    log = _LocalLog if storage.is_local(location) else _StoredLog
    return log(location, size_bytes)


def _payload(location: str) -> bytes:
    return storage.read_bytes(location) if storage.exists(location) else b""


def _lines(location: str, payload: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """Yields each whole line with the offset after it, up to a torn one; raises StorageError."""
    offset = 0
    for number, raw in enumerate(payload.splitlines(keepends=True), start=1):
        if not raw.endswith(b"\n"):
            return
        offset += len(raw)
        try:
            line = json.loads(raw)
            if not isinstance(line, dict):
                raise ValueError(f"expected an object, found {type(line).__name__}")
        except ValueError as error:
            raise _damaged(location, number, f"not JSON: {error}") from error
        yield line, offset


def _damaged(location: str, number: int, fault: str) -> StorageError:
    return StorageError(
        f"{location}, line {number}: {fault}; put an undamaged copy back, or take that line out, "
        "and start again"
    )


def _encoded(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"
