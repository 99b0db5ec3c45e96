"""A small run folder as a finished run leaves it, for the tests that read one."""

import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.report.examples import Attention, Example, Gallery, write_gallery
from pipeline.report.inline_image import thumbnail
from pipeline.report.run_report import write_report

METRICS = {"vqa/accuracy": 81.25, "vqa/accuracy_blind": 40.5, "caption/cider": 1.2345}
TYPES = {"vqa/accuracy/count": 62.5, "vqa/accuracy_blind/count": 31.25}
HOSTILE = '<script>alert("a caption")</script>'


class Page(HTMLParser):
    """The elements of a page, and the elements that were closed in the wrong order."""

    VOID = frozenset({"meta", "link", "img", "input", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.faults: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.faults += [f"<{tag}> is never closed" for tag in self._open if tag != "path"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.text += " "
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.text += " "
        if not self._open or self._open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def words(self) -> str:
        return " ".join(self.text.split())


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 60, 40)).save(buffer, "PNG")
    return buffer.getvalue()


def grid_boxes(rows: int, columns: int) -> np.ndarray:
    """The boxes of a grid's cells: (rows * columns, 4), row by row."""
    y, x = np.mgrid[:rows, :columns]
    cells = [x / columns, y / rows, (x + 1) / columns, (y + 1) / rows]
    return np.stack(cells, axis=-1).reshape(-1, 4).astype(np.float32)


def write_lines(folder: Path, phase: str, num_steps: int, objectives: dict[str, float]) -> None:
    """Writes a phase's metrics.jsonl, whose losses fall from the given values towards zero."""
    (folder / phase).mkdir()
    with (folder / phase / "metrics.jsonl").open("w") as file:
        for step in range(1, num_steps + 1):
            losses = {name: first * math.exp(-step / 50) for name, first in objectives.items()}
            line = {
                "step": step,
                "loss": sum(losses.values()),
                "losses": losses,
                "lr": 1e-3 * step / num_steps,
                "grad_norm": 1.5,
                "samples_per_second": 800 + step,
                "data_wait_fraction": 0.01,
            }
            file.write(json.dumps(line) + "\n")


def make_gallery() -> Gallery:
    rng = np.random.default_rng(3)
    weights = (rng.random((2, 3, 20)) / 40).astype(np.float32)  # L=2, N=3, R=4*5
    picture = thumbnail(png(50, 40))
    return Gallery(
        selection="The first questions and pictures of val.",
        examples=(
            Example(
                key="val-1",
                kind="vqa",
                image=picture,
                references=("red", "red", "dark red"),
                prediction="red",
                question="What colour is it?",
                question_type="attribute",
                score=1.0,
                blind_prediction="blue",
                blind_score=0.0,
                attention=Attention(("[MASK]",), weights[:, :1], grid_boxes(4, 5), (4, 5)),
            ),
            Example(
                key="val-2",
                kind="vqa",
                image=picture,
                references=("2",),
                prediction="3",
                question=HOSTILE,
                score=0.0,
            ),
            Example(
                key="val-3",
                kind="caption",
                image=picture,
                references=("a red square", HOSTILE),
                prediction="a red square",
                attention=Attention(("a", "red", HOSTILE), weights, grid_boxes(4, 5), (4, 5)),
            ),
        ),
    )


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run: three phases, scores, examples, recipe, environment and summary."""
    folder = tmp_path / "quickstart"
    (folder / "evaluation").mkdir(parents=True)
    write_lines(folder, "pretrain", 1200, {"mlm": 6.0, "itm": 0.7})
    write_lines(folder, "finetune", 300, {"vqa": 3.0})
    write_lines(folder, "blind", 300, {"vqa": 3.5})
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(METRICS | TYPES))
    summary = {
        "stages": {
            "ingest": {"seconds": 3.21, "state": "up to date"},
            "pretrain": {"seconds": 185.0, "state": "done"},
        },
        "metrics": METRICS,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    environment = {"revision": "3f2c1ab", "seed": 7, "packages": {"torch": "2.14.0"}}
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "recipe.yaml").write_text(
        f"model:\n  family: visualbert\nnote: '{HOSTILE}'\nfeatures: {{type: pixels}}\n"
    )
    write_gallery(str(folder), make_gallery())
    return folder


def report(run: Path) -> str:
    """The page of a run."""
    location = write_report(str(run))
    assert location == str(run / "report.html")
    return (run / "report.html").read_text()
