import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.training.checkpoints import checkpoint
from pipeline.training.checkpoints.checkpoint import Writer
from pipeline.training.checkpoints.manager import CheckpointManager
from pipeline.training.checkpoints.run_state import RunState
from tests.training.stand_in import make_spec

WRITER = Writer(reproducibility_key={"seed": 1}, zero_stage=1, precision="fp32")

pytestmark = pytest.mark.usefixtures("alone")


def states(step: int) -> Iterator[tuple[str, Tensor]]:
    yield "weight/a", torch.full((2, 3), float(step))


def make_manager(folder: Path, told: list[dict[str, Any]], **settings: Any) -> CheckpointManager:
    def on_event(event: str, **facts: Any) -> None:
        told.append({"event": event, **facts})

    return CheckpointManager(str(folder), make_spec("run", **settings).training, WRITER, on_event)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """While it is not set, no checkpoint gets to the disk."""
    free = threading.Event()
    write = safetensors.torch.save_file

    def save_file(tensors: Any, path: Path) -> None:
        assert free.wait(20)
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    return free


def test_training_goes_on_while_the_disk_is_busy(tmp_path: Path, disk: threading.Event) -> None:
    told: list[dict[str, Any]] = []
    manager = make_manager(tmp_path, told)
    manager.save(3, states(3), RunState())
    assert not manager.is_written()
    assert checkpoint.steps_in(str(tmp_path)) == []
    disk.set()
    manager.wait()
    assert manager.is_written()
    assert checkpoint.steps_in(str(tmp_path)) == []
    manager.finish()
    assert checkpoint.steps_in(str(tmp_path)) == [3]
    (event,) = told
    assert (event["event"], event["step"]) == ("checkpoint", 3)
    assert event["seconds_waited"] >= 0
    assert event["seconds_written"] >= 0


def test_a_save_waits_for_the_one_before_it(tmp_path: Path, disk: threading.Event) -> None:
    manager = make_manager(tmp_path, [])
    manager.save(3, states(3), RunState())
    threading.Timer(0.3, disk.set).start()
    manager.save(6, states(6), RunState())
    assert disk.is_set()
    assert checkpoint.steps_in(str(tmp_path)) == [3]
    manager.finish()
    assert checkpoint.steps_in(str(tmp_path)) == [3, 6]


def test_a_full_disk_is_an_error_when_the_run_next_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    manager = make_manager(tmp_path, [])
    monkeypatch.setattr(checkpoint, "save_file", full)
    manager.save(3, states(3), RunState())
    manager.wait()
    assert manager.is_written()
    with pytest.raises(CheckpointError, match=r"rank 0 could not write its part.*No space left"):
        manager.finish()
    assert list(tmp_path.iterdir()) == []


def test_what_no_rule_wants_is_removed_once_its_successor_is_published(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"evaluation": {"every_steps": 1}, "checkpoints": {"keep_best": 1}}
    manager = make_manager(tmp_path, [], **settings)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 4.0)):
        manager.save(step, states(step), RunState(evaluation={"loss": loss}))
    manager.finish()
    assert checkpoint.steps_in(str(tmp_path)) == [2, 3, 4]
    # a run that continues from step 4 goes by the same figures
    manager = make_manager(tmp_path, [], **settings)
    manager.adopt_existing(4)
    for step in (5, 6):
        manager.save(step, states(step), RunState())
    manager.finish()
    assert checkpoint.steps_in(str(tmp_path)) == [2, 5, 6]


def test_a_damaged_checkpoint_is_told_of_and_left_where_it_is(tmp_path: Path) -> None:
    manager = make_manager(tmp_path, [])
    for step in (1, 2):
        manager.save(step, states(step), RunState())
    manager.finish()
    (tmp_path / "step-00000001" / "manifest.json").write_text("torn")
    told: list[dict[str, Any]] = []
    manager = make_manager(tmp_path, told)
    manager.adopt_existing(2)
    (event,) = told
    assert (event["event"], event["step"]) == ("damaged-checkpoint", 1)
    assert "step-00000001/manifest.json is damaged" in event["reason"]
    for step in (3, 4):
        manager.save(step, states(step), RunState())
    manager.finish()
    assert checkpoint.steps_in(str(tmp_path)) == [1, 3, 4]
