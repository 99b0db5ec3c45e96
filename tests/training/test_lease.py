import threading
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import TrainingError
from pipeline.training import lease
from pipeline.training.lease import only_writer


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SECONDS_TO_WAIT", 2.0)
    monkeypatch.setattr(lease, "SECONDS_BETWEEN_BEATS", 0.1)
    monkeypatch.setattr(lease, "SECONDS_UNTIL_DEAD", 1.0)


@pytest.fixture(params=["disk", "object store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "run")
    location: str = request.getfixturevalue("object_store")
    return location


def test_a_folder_has_one_writer_at_a_time_and_the_next_when_it_leaves(folder: str) -> None:
    with only_writer(folder) as is_lost:
        with pytest.raises(TrainingError, match="another process is training here"):
            only_writer(folder).__enter__()
        assert not is_lost()
    with only_writer(folder) as is_lost:
        assert not is_lost()


def test_a_writer_that_leaves_soon_is_waited_for(folder: str) -> None:
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with only_writer(folder):
            held.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    threading.Timer(0.5, leave.set).start()
    with only_writer(folder):
        assert leave.is_set()
    thread.join()


def test_a_writer_that_died_is_replaced_once_it_has_not_been_heard_of(object_store: str) -> None:
    storage.write_bytes(storage.join(object_store, ".lock-00000003"), b"somebody 12")
    with only_writer(object_store) as is_lost:
        assert not is_lost()
        assert storage.list_names(object_store) == [".lock-00000004"]


def test_a_writer_that_was_given_up_learns_of_it(object_store: str) -> None:
    with only_writer(object_store) as is_lost:
        storage.write_bytes(storage.join(object_store, ".lock-00000002"), b"another")
        for _ in range(100):
            if is_lost():
                break
            threading.Event().wait(0.05)
        assert is_lost()
    assert storage.read_bytes(storage.join(object_store, ".lock-00000002")) == b"another"
