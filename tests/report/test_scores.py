from pathlib import Path

from tests.report.conftest import METRICS, Page, report


def test_the_numbers_shown_are_those_of_the_files(run_folder: Path) -> None:
    page = Page(report(run_folder))
    words = page.words()
    assert "VQA accuracy 81.25 %" in words
    assert "blind twin 40.50" in words
    assert "+40.75 points" in words
    assert "CIDEr 1.234" in words or "CIDEr 1.235" in words
    assert "count 62.50 31.25 +31.25" in words
    assert "pretrain done 3 min 05 s" in words
    assert "ingest up to date 3.2 s" in words
    titles = [attributes["title"] for attributes in page.all("p") if "title" in attributes]
    assert titles == ["vqa/accuracy = 81.25", "caption/cider = 1.2345"]
    for name, value in METRICS.items():
        assert f"{name} {value}" in words
