import json
from pathlib import Path

import pytest

from tests.report.conftest import Page, report


def test_the_example_shows_answers_marks_and_what_people_said(run_folder: Path) -> None:
    page = Page(report(run_folder))
    words = page.words()
    assert "val-1 attribute What colour is it? Model red ✓ Blind twin blue ✗" in words
    assert "People: red ×2, dark red ×1" in words
    assert [item["data-is"] for item in page.all("article") if "data-is" in item] == [
        "right picture",
        "wrong",
    ]


def test_the_attention_of_the_page_is_that_of_the_examples(run_folder: Path) -> None:
    page = Page(report(run_folder))
    answer, caption = [box for box in page.all("div") if "data-maps" in box]
    assert (answer["data-layers"], answer["data-tokens"], answer["data-grid"]) == ("2", "1", "4,5")
    assert (caption["data-layers"], caption["data-tokens"]) == ("2", "3")
    examples = json.loads((run_folder / "evaluation" / "examples.json").read_text())["examples"]
    last = sum(examples[0]["attention"]["weights"][1][0])
    assert float((answer["data-shares"] or "").split(",")[2]) == pytest.approx(last, abs=2e-4)
