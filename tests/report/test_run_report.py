import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.errors import StageError
from pipeline.report.run_report import write_report
from tests.report.conftest import HOSTILE, METRICS, Page
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


def report(run: Path) -> str:
    location = write_report(str(run))
    assert location == str(run / "report.html")
    return (run / "report.html").read_text()


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


def test_the_blind_twins_curve_is_drawn_into_that_of_the_model(run_folder: Path) -> None:
    page = Page(report(run_folder))
    labels = [svg["aria-label"] or "" for svg in page.all("svg") if svg.get("role") == "img"]
    (answers,) = [label for label in labels if label.startswith("Loss: answers")]
    assert "model goes from" in answers
    assert "blind twin goes from" in answers
    assert any(label.startswith("Loss: masked words") for label in labels)


def test_the_sentence_says_what_the_run_is(run_folder: Path) -> None:
    words = Page(report(run_folder)).words()
    assert (
        "VisualBERT reading raw pixels, pretrained on masked words and image–text matching for "
        "1,200 steps, fine-tuned on answers for 300 steps; beside it, a blind twin"
    ) in words


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
