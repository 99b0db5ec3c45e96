import re
from pathlib import Path

import pytest

from pipeline.errors import StageError
from pipeline.report.run_report import write_report
from tests.report.conftest import Page, report


def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=str(tmp_path)):
        write_report(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_scores_that_disagree_are_said_to(run_folder: Path) -> None:
    (run_folder / "evaluation" / "metrics.json").write_text('{"vqa/accuracy": 79.0}')
    words = Page(report(run_folder)).words()
    assert "summary.json gives vqa/accuracy as 81.25, evaluation/metrics.json as 79" in words


@pytest.mark.parametrize("name", ["summary.json", "environment.json", "evaluation/metrics.json"])
def test_a_damaged_file_is_named(run_folder: Path, name: str) -> None:
    (run_folder / name).write_text('{"cut')
    with pytest.raises(StageError, match=re.escape(name)):
        write_report(str(run_folder))
