"""The report of a run, RUN/report.html: one page that shows what came of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.report.cards import card_of
from pipeline.report.inline_image import shared_ratio
from pipeline.report.page import duration, render
from pipeline.report.phase_charts import phase_charts
from pipeline.report.run_files import Run, read_run
from pipeline.report.scores import METRICS, tiles, type_rows
from pipeline.report.sentence import sentence

FIRST_EXAMPLES = {"vqa": 8, "caption": 8}  # of each kind; the others wait in a fold


@dataclass(frozen=True)
class StageRow:
    name: str
    state: str
    time: str
    share: float  # of the longest stage, in percent


def write_report(run: str) -> str:
    """Writes RUN/report.html from the files of the run alone, and returns its location.

    A run that is not finished gets a report that says what is missing; no number is shown that
    is not in a file. Raises StageError if this is no run, and it or StorageError if one of its
    files is damaged.
    """
    found = read_run(run)
    location = storage.join(run, "report.html")
    storage.write_bytes(location, render("report.html", **_values(found)))
    return location


def _values(run: Run) -> dict[str, Any]:
    cards = [card_of(example) for example in run.gallery.examples] if run.gallery else []
    shown = {kind: [card for card in cards if card.example.kind == kind] for kind in FIRST_EXAMPLES}
    headlines = [name for name in run.headlines or METRICS if name in run.metrics]
    return {
        "run": run,
        "sentence": sentence(run),
        "tiles": tiles(run.metrics, headlines),
        "questions": shown["vqa"],
        "captions": shown["caption"],
        "ratios": {
            kind: shared_ratio([card.picture for card in of_kind])
            for kind, of_kind in shown.items()
        },
        "first": FIRST_EXAMPLES,
        "num_layers": max((card.num_layers for card in cards), default=0),
        "phases": phase_charts(run.phases),
        "types": type_rows(run.metrics),
        "stages": _stages(run.stages),
        "total_time": duration(sum(float(row["seconds"]) for row in run.stages.values())),
        "environment": _flat(
            {key: value for key, value in (run.environment or {}).items() if key != "stretches"}
        ),
    }


def _stages(stages: Mapping[str, Mapping[str, Any]]) -> list[StageRow]:
    longest = max((float(row["seconds"]) for row in stages.values()), default=0.0) or 1.0
    return [
        StageRow(
            name=name,
            state=str(row["state"]),
            time=duration(float(row["seconds"])),
            share=100 * float(row["seconds"]) / longest,
        )
        for name, row in stages.items()
    ]


def _flat(document: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns groups of (name, value) rows: loose values first, then one group per mapping."""
    loose = [(name, _plain(value)) for name, value in document.items() if not _is_group(value)]
    groups = [(name, _leaves(value)) for name, value in document.items() if _is_group(value)]
    return [("", loose), *groups] if loose else groups


def _leaves(document: Mapping[str, Any], start: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in document.items():
        if _is_group(value):
            rows += _leaves(value, f"{start}{name}.")
        else:
            rows.append((f"{start}{name}", _plain(value)))
    return rows


def _is_group(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return json.dumps(value, ensure_ascii=False)
