from pathlib import Path

import pytest

from pipeline.stages.state import Record, identity, once


def test_work_is_done_once_for_one_identity(tmp_path: Path) -> None:
    calls: list[int] = []

    def work() -> dict[str, int]:
        calls.append(1)
        return {"made": len(calls)}

    first = once(str(tmp_path), "ingest", {"lr": 0.1}, work)
    again = once(str(tmp_path), "ingest", {"lr": 0.1}, work)
    other = once(str(tmp_path), "ingest", {"lr": 0.2}, work)
    assert (first.state, again.state, other.state) == ("done", "up to date", "done")
    assert again.outputs == {"made": 1}
    assert other.outputs == {"made": 2}


def test_a_half_done_stage_is_never_taken_for_done(tmp_path: Path) -> None:
    def broken() -> dict[str, int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        once(str(tmp_path), "pretrain", {"step": 1}, broken)
    left = Record.read(str(tmp_path), "pretrain")
    assert left is not None
    assert left.state == "running"
    assert once(str(tmp_path), "pretrain", {"step": 1}, lambda: {}).state == "done"


def test_a_record_that_nobody_can_read_is_none(tmp_path: Path) -> None:
    once(str(tmp_path), "ingest", {"lr": 1}, lambda: {})
    record = tmp_path / "stages" / "ingest.json"
    wrong = b'{"identity": "a", "state": "done", "seconds": "long", "outputs": null}'
    for damaged in (b"", b"{", b"[1]", b'{"state": "done"}', wrong):
        record.write_bytes(damaged)
        assert Record.read(str(tmp_path), "ingest") is None


def test_identity_does_not_depend_on_key_order() -> None:
    assert identity({"a": 1, "b": [2]}) == identity({"b": [2], "a": 1})
    assert identity({"a": 1}) != identity({"a": 1.5})
