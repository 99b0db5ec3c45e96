from pathlib import Path

import pytest

from pipeline.training import stop_request
from pipeline.training.stop_request import (
    STOP,
    StopRequest,
    asked_to_leave,
    clear_stop,
    request_stop,
)


def test_a_request_is_seen_until_it_is_taken_back(tmp_path: Path) -> None:
    request = StopRequest(str(tmp_path))
    assert not request.is_requested()
    request_stop(str(tmp_path))
    assert request.is_requested()
    clear_stop(str(tmp_path))
    assert not request.is_requested()


def test_an_object_store_is_not_asked_after_every_step(
    object_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = StopRequest(object_store)
    assert not request.is_requested()
    request_stop(object_store)
    assert not request.is_requested()
    monkeypatch.setattr(stop_request, "SECONDS_BETWEEN_POLLS", 0.0)
    later = StopRequest(object_store)
    assert later.is_requested()
    assert later.is_requested()


def test_ranks_are_asked_to_leave_for_a_while_and_what_others_ask_stays(tmp_path: Path) -> None:
    mine, theirs = str(tmp_path / "mine"), str(tmp_path / "theirs")
    request_stop(theirs)
    with asked_to_leave([mine, theirs]):
        assert StopRequest(mine).is_requested()
        assert StopRequest(theirs).is_requested()
    assert not (tmp_path / "mine" / STOP).exists()
    assert StopRequest(theirs).is_requested()
