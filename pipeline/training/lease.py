"""The lease on a run's folder: one command, and one process of a phase, may write in it.

The lock lies beside what may be moved or replaced: RUN/.lock for a command, held over all of its
stages, and RUN/.<phase>.lock for the ranks that train a phase, which may outlive their command by
some seconds. It says who holds it.
"""

import contextlib
import fcntl
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from pipeline import storage
from pipeline.errors import BusyError, StorageError

LOCK = ".lock"

SECONDS_TO_WAIT = 60.0  # for ranks; a killed driver's local cluster is gone after seven or so
SECONDS_BETWEEN_BEATS = 5.0
SECONDS_UNTIL_DEAD = 30.0  # without a beat

_RELEASED = b"released"

IsLost = Callable[[], bool]
OnWait = Callable[[str], None]


def _nobody_asked(_: str) -> None:
    """What is told of waiting where nobody listens."""


@contextlib.contextmanager
def only_command(run: str, on_wait: OnWait = _nobody_asked) -> Iterator[IsLost]:
    """Keeps every other command out of a run's folder inside the block.

    Yields a function that tells whether the folder was lost, as happens to a process that an object
    store has not heard of for a while. Raises BusyError, naming who holds it, if another command is
    at work: at once, or in an object store once its next sign of life is seen.
    """
    with _held(storage.join(run, LOCK), run, 0.0, on_wait) as is_lost:
        yield is_lost


@contextlib.contextmanager
def only_writer(folder: str, on_wait: OnWait = _nobody_asked) -> Iterator[IsLost]:
    """Keeps the ranks of every other start out of a phase's folder inside the block.

    As `only_command`, but waits for others first: the ranks of a killed command live a few seconds
    longer than it does. Raises BusyError if they stay.
    """
    above, _, name = folder.rstrip("/").rpartition("/")
    lock = storage.join(above, f".{name}{LOCK}") if above else f".{name}{LOCK}"
    with _held(lock, folder, SECONDS_TO_WAIT, on_wait) as is_lost:
        yield is_lost


@contextlib.contextmanager
def _held(lock: str, what: str, seconds: float, on_wait: OnWait) -> Iterator[IsLost]:
    if storage.is_local(lock):
        with _locked(storage.local_path(lock), what, seconds, on_wait) as is_lost:
            yield is_lost
    else:
        with _Lease(lock, what, seconds, on_wait).held() as is_lost:
            yield is_lost


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    host: str
    pid: int
    job: str | None  # of a Ray cluster, if the process is one's
    since: str  # UTC
    machine: str | None  # what process numbers are of: a boot and a namespace; None: not known
    started: str | None  # when the process began, in the machine's own count

    @classmethod
    def here(cls) -> Self:
        pid = os.getpid()
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
        return cls(socket.gethostname(), pid, _job(), since, _machine(), _started(pid))

    @classmethod
    def read(cls, payload: bytes) -> "Holder | None":
        """Returns who wrote it; None if that cannot be told."""
        try:
            document: dict[str, Any] = json.loads(payload)
            return cls(**document["holder"])
        except (ValueError, TypeError, KeyError):
            return None

    def is_alive(self) -> bool | None:
        """Whether the process lives; None if it cannot be told, as of another machine."""
        if self.machine is None or self.machine != _machine():
            return None
        return self.started is not None and _started(self.pid) == self.started

    def __str__(self) -> str:
        job = f", Ray job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since} UTC"


def _busy(what: str, holder: Holder | None) -> BusyError:
    return BusyError(
        f"{what}: another command is at work here ({holder or 'it does not say who'}); wait for "
        "it or stop it, or choose another folder (`run=…`). Nothing was touched"
    )


def _job() -> str | None:
    """Returns the submission of the Ray job that this process is the driver of, if it is."""
    try:
        document = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        job = document.get("metadata", {}).get("job_submission_id")
    except (ValueError, AttributeError):
        return None
    return job if isinstance(job, str) else None


def _machine() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Returns when a process began; None if there is none, or if it has ended already."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else fields[19]


@contextlib.contextmanager
def _locked(path: Path, what: str, seconds: float, on_wait: OnWait) -> Iterator[IsLost]:
    """Holds a lock that ends with this process, however it ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path.parent}: cannot be made a folder: {error}") from error
    deadline = time.monotonic() + seconds
    told = False
    while True:
        descriptor = _try_lock(path, what)
        if descriptor is not None:
            break
        with contextlib.suppress(OSError):
            holder = Holder.read(path.read_bytes())
        if time.monotonic() >= deadline:
            raise _busy(what, holder)
        if not told:
            on_wait(f"{what}: waiting for what an earlier command left at work ({holder})")
            told = True
        time.sleep(0.2)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _signed(0), 0)
        yield lambda: not _is_at(descriptor, path)
    finally:
        os.close(descriptor)


def _try_lock(path: Path, what: str) -> int | None:
    """Returns the descriptor of a file that is locked; None if somebody else has it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StorageError(f"{what}: cannot be locked: {error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        raise StorageError(f"{what}: cannot be locked: {error}") from error
    if not _is_at(descriptor, path):  # removed since it was opened: another is there by now
        os.close(descriptor)
        return None
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _signed(beats: int, owner: str = "") -> bytes:
    document = {"owner": owner, "beats": beats, "holder": asdict(Holder.here())}
    return json.dumps(document).encode()


class _Lease:
    """A lock in an object store, which has no locks: an object that its owner keeps rewriting.

    Leases are numbered, and the newest is the one that counts. A process takes the folder by
    creating the next number, which an object store lets only one of them do, when the newest is
    released, or its owner is known to be dead, or it has not changed for a while by this process's
    own clock. An owner that was given up sees a newer number at its next beat.
    """

    def __init__(self, lock: str, what: str, seconds: float, on_wait: OnWait) -> None:
        self._folder, _, name = lock.rpartition("/")
        self._name = name
        self._names = re.compile(re.escape(name) + r"-(\d{8})")
        self._what = what
        self._seconds_to_wait = seconds
        self._on_wait = on_wait
        self._owner = uuid.uuid4().hex
        self._number = 0
        self._lost = threading.Event()
        self._ended = threading.Event()

    @contextlib.contextmanager
    def held(self) -> Iterator[IsLost]:
        self._take()
        beating = threading.Thread(target=self._beat, name="beat-lease", daemon=True)
        beating.start()
        try:
            yield self._lost.is_set
        finally:
            self._ended.set()
            beating.join()
            if not self._lost.is_set():
                storage.write_bytes(self._location(self._number), _RELEASED)

    def _take(self) -> None:
        began = changed = time.monotonic()
        seen: tuple[int, bytes] | None = None
        while True:
            found = self._look()
            newest = found[0]
            holder = Holder.read(found[1])
            alive = holder.is_alive() if holder else None
            now = time.monotonic()
            free = found[1] == _RELEASED or alive is False
            beats = alive or (seen is not None and found != seen)
            if not free and beats and now - began >= self._seconds_to_wait:
                raise _busy(self._what, holder)
            if seen is None and not free:
                who = holder or "it does not say who"
                self._on_wait(f"{self._what}: looking whether who holds it still lives ({who})")
            if found != seen:
                seen, changed = found, now
            free = free or now - changed > SECONDS_UNTIL_DEAD
            if free and storage.create(self._location(newest + 1), _signed(0, self._owner)):
                break
            time.sleep(min(1.0, SECONDS_BETWEEN_BEATS))
        self._number = newest + 1
        for number in self._numbers():  # of no more use; the newest stays, so numbers only rise
            if number < self._number:
                storage.remove(self._location(number))

    def _beat(self) -> None:
        beats, heard = 0, time.monotonic()
        while not self._ended.wait(SECONDS_BETWEEN_BEATS):
            try:
                if self._newest() > self._number:
                    self._lost.set()
                    return
                beats += 1
                storage.write_bytes(self._location(self._number), _signed(beats, self._owner))
                heard = time.monotonic()
            except StorageError:  # the next beat may come through; others give us up as late
                if time.monotonic() - heard > SECONDS_UNTIL_DEAD:
                    self._lost.set()
                    return

    def _look(self) -> tuple[int, bytes]:
        """Returns the newest lease and what it says."""
        while True:
            newest = self._newest()
            if not newest:
                return 0, _RELEASED
            with contextlib.suppress(StorageError):  # it made way for a newer one
                return newest, storage.read_bytes(self._location(newest))

    def _newest(self) -> int:
        return max(self._numbers(), default=0)

    def _numbers(self) -> list[int]:
        names = (self._names.fullmatch(name) for name in storage.list_names(self._folder))
        return [int(match[1]) for match in names if match]

    def _location(self, number: int) -> str:
        return storage.join(self._folder, f"{self._name}-{number:08d}")
