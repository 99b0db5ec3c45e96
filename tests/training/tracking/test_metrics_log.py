import json
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import StorageError
from pipeline.training.tracking import metrics_log
from pipeline.training.tracking.metrics_log import METRICS, Follower, MetricsLog, read_metrics


def write_steps(folder: Path, first: int, last: int) -> None:
    with MetricsLog(str(folder), first - 1) as log:
        for step in range(first, last + 1):
            log.step({"step": step, "loss": 1 / step})


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(str(folder))]


def test_lines_of_steps_that_are_made_again_are_cut_off(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 7)
    write_steps(tmp_path, 5, 6)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_torn_last_line_is_read_over_and_then_replaced(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3)
    path = tmp_path / METRICS
    path.write_bytes(path.read_bytes()[:-4])
    assert steps(tmp_path) == [1, 2]
    write_steps(tmp_path, 3, 4)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3)
    path = tmp_path / METRICS
    path.write_bytes(path.read_bytes().replace(b'{"step": 2', b'{"step: 2'))
    with pytest.raises(StorageError, match="line 2"):
        read_metrics(str(tmp_path))


def test_a_follower_sees_each_new_line_once_and_only_whole(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    follower = Follower(str(tmp_path), METRICS)
    assert follower.new_lines() == []
    write_steps(tmp_path, 3, 4)
    with (tmp_path / METRICS).open("ab") as file:
        file.write(b'{"step": 5')
    assert [line["step"] for line in follower.new_lines()] == [3, 4]
    with (tmp_path / METRICS).open("ab") as file:
        file.write(b"}\n")
    assert [line["step"] for line in follower.new_lines()] == [5]


def test_a_follower_goes_on_where_the_log_was_cut_back_to(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 6)
    follower = Follower(str(tmp_path), METRICS)
    with MetricsLog(str(tmp_path), 3):
        assert follower.new_lines() == []
    write_steps(tmp_path, 4, 5)
    assert [line["step"] for line in follower.new_lines()] == [4, 5]


def test_events_carry_their_name_and_time(tmp_path: Path) -> None:
    with MetricsLog(str(tmp_path), 0) as log:
        log.event("checkpoint", step=3)
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (event["event"], event["step"], event["time"] > 0) == ("checkpoint", 3, True)


def test_a_log_in_an_object_store_is_whole_when_flushed_and_cut_back_like_one_on_a_disk(
    object_store: str,
) -> None:
    follower = Follower(object_store, METRICS)
    with MetricsLog(object_store, 0) as log:
        for step in (1, 2, 3):
            log.step({"step": step})
        assert read_metrics(object_store) == []  # not each line is a write
        log.flush()
        assert [line["step"] for line in follower.new_lines()] == [1, 2, 3]
        log.step({"step": 4})
        log.event("finished")
    assert [line["step"] for line in follower.new_lines()] == [4]
    with MetricsLog(object_store, 2) as log:
        assert follower.new_lines() == []
        log.step({"step": 3})
    assert [line["step"] for line in follower.new_lines()] == [3]
    assert [line["step"] for line in read_metrics(object_store)] == [1, 2, 3]
    payload = storage.read_bytes(storage.join(object_store, "events.jsonl"))
    assert [json.loads(line)["event"] for line in payload.splitlines()] == ["finished"]


def test_a_log_in_an_object_store_is_written_every_so_often_by_itself(
    object_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_log, "SECONDS_BETWEEN_WRITES", 0.0)
    with MetricsLog(object_store, 0) as log:
        log.step({"step": 1})
        assert len(read_metrics(object_store)) == 1


@pytest.mark.parametrize("damaged", ['{"step": 2, "l', "7"])
def test_a_damaged_line_is_named_with_what_to_do(tmp_path: Path, damaged: str) -> None:
    write_steps(tmp_path, 1, 3)
    log = tmp_path / METRICS
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], damaged, lines[2], ""]))
    before = log.read_bytes()
    with pytest.raises(StorageError, match=r"line 2: not JSON: .*take that line out"):
        write_steps(tmp_path, 4, 4)
    assert log.read_bytes() == before
