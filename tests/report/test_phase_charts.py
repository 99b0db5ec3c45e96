import json
from pathlib import Path

from tests.report.conftest import HOSTILE, Page, report


def test_the_blind_twins_curve_is_drawn_into_that_of_the_model(run_folder: Path) -> None:
    page = Page(report(run_folder))
    labels = [svg["aria-label"] or "" for svg in page.all("svg") if svg.get("role") == "img"]
    (answers,) = [label for label in labels if label.startswith("Loss: answers")]
    assert "model goes from" in answers
    assert "blind twin goes from" in answers
    assert any(label.startswith("Loss: masked words") for label in labels)


def test_a_run_that_went_on_with_other_settings_shows_where_and_which(run_folder: Path) -> None:
    log = run_folder / "finetune" / "metrics.jsonl"
    changed = {"training.finetune.steps": [200, 300], HOSTILE: [1, 2]}
    begun = {"event": "stretch", "step": 200, "changed": changed, "dataset_version": 3, "time": 1.0}
    log.write_text(log.read_text() + json.dumps(begun) + "\n")
    page = Page(report(run_folder))
    assert page.faults == []
    marks = [path for path in page.all("path") if path.get("class") == "stretch"]
    assert len(marks) == 5  # in fine-tuning's loss and its four small curves
    assert "after step 200 training.finetune.steps: 200 → 300" in page.words()
