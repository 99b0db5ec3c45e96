from pathlib import Path

from tests.report.conftest import Page, report


def test_the_sentence_says_what_the_run_is(run_folder: Path) -> None:
    words = Page(report(run_folder)).words()
    assert (
        "VisualBERT reading raw pixels, pretrained on masked words and image–text matching for "
        "1,200 steps, fine-tuned on answers for 300 steps; beside it, a blind twin"
    ) in words
