import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import BusyError, StorageError
from pipeline.training import lease
from pipeline.training.lease import Holder, only_command, only_writer
from tests.processes import DISK_AND_OBJECT_STORE

HOLD = """
import sys, time
from pipeline.training.lease import only_command, only_writer
with {"command": only_command, "writer": only_writer}[sys.argv[1]](sys.argv[2]):
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SECONDS_TO_WAIT", 2.0)
    monkeypatch.setattr(lease, "SECONDS_BETWEEN_BEATS", 0.1)
    monkeypatch.setattr(lease, "SECONDS_UNTIL_DEAD", 1.0)


@pytest.fixture(params=DISK_AND_OBJECT_STORE)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "run")
    location: str = request.getfixturevalue("object_store")
    return location


@contextmanager
def held_elsewhere(by: str, folder: str) -> Iterator["subprocess.Popen[str]"]:
    """Yields another process that holds the folder, for longer than any test."""
    command = [sys.executable, "-c", HOLD, by, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def of_another_machine(beats: int = 0) -> bytes:
    holder = replace(Holder.here(), host="node-3", pid=7, job="birds-1", machine="another")
    return json.dumps({"owner": "x", "beats": beats, "holder": asdict(holder)}).encode()


def test_a_folder_has_one_writer_at_a_time_and_the_next_when_it_leaves(folder: str) -> None:
    for only in (only_writer, only_command):
        with only(folder) as is_lost:
            with pytest.raises(BusyError, match="another command is at work here"):
                only(folder).__enter__()
            assert not is_lost()
        with only(folder) as is_lost:
            assert not is_lost()


@pytest.mark.processes
def test_a_command_is_refused_at_once_and_told_who_holds_the_folder(folder: str) -> None:
    with held_elsewhere("command", folder) as process:
        began = time.monotonic()
        with pytest.raises(BusyError) as refusal:
            only_command(folder).__enter__()
        assert time.monotonic() - began < lease.SECONDS_TO_WAIT
        assert f"process {process.pid} on {socket.gethostname()}, since 20" in str(refusal.value)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with only_command(folder) as is_lost:
            assert not is_lost()


def test_the_ranks_of_a_command_are_none_that_hold_its_folder(folder: str) -> None:
    with only_command(folder), only_writer(storage.join(folder, "pretrain")):
        pass


def test_a_writer_that_leaves_soon_is_waited_for_and_told_of(folder: str) -> None:
    held, leave = threading.Event(), threading.Event()
    told: list[str] = []

    def hold() -> None:
        with only_writer(folder):
            held.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    threading.Timer(0.5, leave.set).start()
    with only_writer(folder, told.append):
        assert leave.is_set()
    thread.join()
    (line,) = told
    assert f"process {os.getpid()}" in line


def test_a_lock_lies_beside_what_may_be_moved(tmp_path: Path) -> None:
    with only_writer(str(tmp_path / "run" / "pretrain")):
        (tmp_path / "run" / "pretrain").mkdir()
        (tmp_path / "run" / "pretrain").rename(tmp_path / "run" / "pretrain.replaced-1")
        with pytest.raises(BusyError):
            only_writer(str(tmp_path / "run" / "pretrain")).__enter__()


def test_a_lock_that_was_taken_away_is_known_to_be_lost(tmp_path: Path) -> None:
    with only_command(str(tmp_path / "run")) as is_lost:
        (tmp_path / "run" / ".lock").unlink()
        assert is_lost()


def test_a_folder_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot be made a folder"):
        only_command(str(tmp_path / "file" / "run")).__enter__()


def test_a_ray_job_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = {"metadata": {"job_submission_id": "birds-20260101"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(metadata))
    assert "Ray job birds-20260101" in str(Holder.here())
    for unreadable in ("", "[]", '{"metadata": 3}'):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", unreadable)
        assert Holder.here().job is None


def test_a_command_on_another_machine_is_seen_by_its_signs_of_life(object_store: str) -> None:
    lock = storage.join(object_store, ".lock-00000003")
    storage.write_bytes(lock, of_another_machine())
    ended = threading.Event()

    def beat() -> None:
        beats = 0
        while not ended.wait(0.1):
            beats += 1
            storage.write_bytes(lock, of_another_machine(beats))

    thread = threading.Thread(target=beat)
    thread.start()
    told: list[str] = []
    with pytest.raises(BusyError, match="process 7 on node-3, Ray job birds-1"):
        only_command(object_store, told.append).__enter__()
    ended.set()
    thread.join()
    assert "still lives (process 7 on node-3" in told[0]
    with only_command(object_store) as is_lost:  # it is not heard of any more
        assert not is_lost()
        assert storage.list_names(object_store) == [".lock-00000004"]


def test_a_lease_that_does_not_say_whose_it_is_is_waited_for_as_any(object_store: str) -> None:
    storage.write_bytes(storage.join(object_store, ".lock-00000003"), b"somebody 12")
    with only_command(object_store) as is_lost:
        assert not is_lost()
        assert storage.list_names(object_store) == [".lock-00000004"]


def test_a_writer_that_was_given_up_learns_of_it(object_store: str) -> None:
    run = storage.join(object_store, "run")
    lock = storage.join(object_store, ".run.lock-00000002")
    with only_writer(run) as is_lost:
        storage.write_bytes(lock, b"another")
        for _ in range(100):
            if is_lost():
                break
            threading.Event().wait(0.05)
        assert is_lost()
    assert storage.read_bytes(lock) == b"another"
