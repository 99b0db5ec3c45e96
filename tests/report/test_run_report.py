import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.report.conftest import HOSTILE, Page, report
from tests.report.test_page import script_digest

PARTS = [
    "recipe.yaml",
    "environment.json",
    "summary.json",
    "pretrain",
    "finetune",
    "blind",
    "evaluation/metrics.json",
    "evaluation/examples.json",
]


def remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part)
    else:
        part.unlink()


def test_the_page_is_well_formed_and_every_picture_and_curve_has_a_text(run_folder: Path) -> None:
    page = Page(report(run_folder))
    assert page.faults == []
    assert len(page.all("img")) == 3
    assert all(image["alt"] for image in page.all("img"))
    curves = [svg for svg in page.all("svg") if svg.get("role") == "img"]
    assert curves
    assert all(curve["aria-label"] for curve in curves)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        assert (link["href"] or "")[1:] in ids


def test_the_page_asks_the_network_for_nothing(run_folder: Path) -> None:
    html = report(run_folder)
    page = Page(html)
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "poster", "action", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("data:", "#")), (tag, attributes)
    assert not re.search(r"https?://", html)
    assert "default-src 'none'" in html
    named, found = script_digest(html)
    assert named == found


def test_text_of_questions_captions_words_and_recipes_is_never_markup(run_folder: Path) -> None:
    html = report(run_folder)
    page = Page(html)
    assert HOSTILE not in html
    assert len(page.all("script")) == 1
    assert page.text.count(HOSTILE) == 4  # the question, the word, the reference, the recipe


def test_the_same_run_gives_the_same_page(run_folder: Path) -> None:
    assert report(run_folder) == report(run_folder)


@pytest.mark.parametrize("part", PARTS)
def test_a_run_without_one_part_gets_a_report_that_says_so(run_folder: Path, part: str) -> None:
    remove(run_folder / part)
    page = Page(report(run_folder))
    assert page.faults == []
    notice = page.words().split("Not all of a finished run is here", 1)[1]
    assert part in notice.split("VQA accuracy")[0]


@pytest.mark.parametrize("part", PARTS)
def test_a_run_with_only_one_part_gets_a_report_without_invented_numbers(
    run_folder: Path, part: str
) -> None:
    for other in PARTS:
        if other != part:
            remove(run_folder / other)
    page = Page(report(run_folder))
    assert page.faults == []
    has_scores = part in ("summary.json", "evaluation/metrics.json")
    assert ("No score yet" in page.text) != has_scores
    assert ("81.25" in page.text) == has_scores


def test_thousands_of_steps_make_a_page_of_about_the_same_size(run_folder: Path) -> None:
    short = len(report(run_folder))
    lines = [
        json.dumps({"step": step, "losses": {"mlm": 2.0 + step % 7, "itm": 0.5}, "loss": 2.5})
        for step in range(1, 40_001)
    ]
    (run_folder / "pretrain" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert len(report(run_folder)) < 2 * short


@pytest.mark.processes
def test_a_browser_draws_the_page_without_an_error(run_folder: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("needs chromium, which is not installed")
    report(run_folder)
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync dump-dom "
    flags += "disable-background-networking disable-component-update enable-logging=stderr "
    flags += f"virtual-time-budget=2000 user-data-dir={tmp_path / 'profile'}"
    command = [browser, *(f"--{flag}" for flag in flags.split())]

    done = subprocess.run(
        [*command, f"file://{run_folder}/report.html"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )

    assert "CONSOLE" not in done.stderr
    assert re.search(r'class="looked" data-unit="share">\d+(\.\d)?% on the picture', done.stdout)
    assert re.search(r'<canvas aria-hidden="true" width="5" height="4"', done.stdout)
    assert len(re.findall(r'class="word" aria-pressed="true"', done.stdout)) == 1
