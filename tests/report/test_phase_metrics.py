import json
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.report.curves import chart
from pipeline.report.phase_metrics import PhaseMetrics
from tests.report.conftest import write_lines


def test_a_step_recorded_twice_keeps_its_last_line_and_a_torn_line_is_reported(
    tmp_path: Path,
) -> None:
    (tmp_path / "pretrain").mkdir()
    lines = '{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 9.0}\n{"step": 2, "loss": 4.0}\n{"st'
    (tmp_path / "pretrain" / "metrics.jsonl").write_text(lines)

    metrics = PhaseMetrics.read(str(tmp_path), "pretrain")

    assert metrics.steps.tolist() == [1, 2]
    assert metrics.value("loss", "total", "model").values.tolist() == [5.0, 4.0]
    assert metrics.is_cut_short


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "blind").mkdir()
    (tmp_path / "blind" / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(StorageError, match=r"blind/metrics\.jsonl, line 2"):
        PhaseMetrics.read(str(tmp_path), "blind")


def test_an_objective_that_starts_late_has_only_its_own_steps(tmp_path: Path) -> None:
    write_lines(tmp_path, "pretrain", 3, {"mlm": 2.0})
    with (tmp_path / "pretrain" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "losses": {"mlm": 1.0, "itm": 0.5}}\n')

    metrics = PhaseMetrics.read(str(tmp_path), "pretrain")

    assert metrics.objectives() == ["mlm", "itm"]
    assert metrics.loss("itm", "itm", "model").steps.tolist() == [4]


def test_a_stretch_is_marked_where_it_begins_and_is_no_step(tmp_path: Path) -> None:
    write_lines(tmp_path, "pretrain", 20, {"mlm": 6.0})
    lines = (tmp_path / "pretrain" / "metrics.jsonl").read_text().splitlines(keepends=True)
    changed = {"training.pretrain.optimizer.learning_rate": [0.002, 0.001]}
    begun = {"event": "stretch", "step": 10, "changed": changed, "dataset_version": 3, "time": 1.0}
    lines.insert(10, json.dumps(begun) + "\n")
    (tmp_path / "pretrain" / "metrics.jsonl").write_text("".join(lines))
    metrics = PhaseMetrics.read(str(tmp_path), "pretrain")
    assert metrics.steps.tolist() == list(range(1, 21))
    (stretch,) = metrics.stretches
    assert stretch.step == 10
    assert stretch.described() == "training.pretrain.optimizer.learning_rate: 0.002 → 0.001"
    drawn = chart("Loss", [metrics.value("loss", "model", "model")], stretches=metrics.stretches)
    (mark,) = drawn.marks
    assert drawn.lines[0].raw.split("L")[9].split()[0] == f"{mark.at}"
    assert "after step 10: training.pretrain.optimizer.learning_rate" in mark.text
