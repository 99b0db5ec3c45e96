"""The stages of a recipe in order, each run if it is out of date, and a table of what they made."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import config, storage
from pipeline.recipe import Recipe
from pipeline.stages import evaluate, extract, ingest, report, train
from pipeline.stages.environment import write_environment
from pipeline.stages.preflight import preflight
from pipeline.stages.progress import StageProgress
from pipeline.stages.state import Outcome

STAGES: Mapping[str, Callable[[Recipe, StageProgress], Outcome]] = {
    "ingest": ingest.run,
    "extract": extract.run,
    "pretrain": train.pretrain,
    "finetune": train.finetune,
    "evaluate": evaluate.run,
    "report": report.run,
}

Summary = dict[str, Any]

_CHANGES = ("added", "edited", "removed", "unchanged")  # of records, since the last ingest


def run_stages(
    recipe: Recipe, names: Sequence[str], console: Console, allow_removals: bool = False
) -> Summary:
    """Runs the named stages and returns what RUN/summary.json then holds.

    `stages` has for each stage its state and seconds in this command, and `work_seconds`, what
    the work took when it was done; for ingest also `records`, what it found. Raises ConfigError
    before any work if a file is missing. `allow_removals` is for ingest.
    """
    stages = {**STAGES, "ingest": partial(ingest.run, allow_removals=allow_removals)}
    preflight(recipe)
    storage.write_bytes(storage.join(recipe.run, "recipe.yaml"), config.to_yaml(recipe).encode())
    outcomes = {}
    for name in names:
        started = time.monotonic()
        with StageProgress(console, name) as progress:
            outcome = stages[name](recipe, progress)
        outcomes[name] = outcome
        seconds = time.monotonic() - started
        console.print(_line(name, outcome, seconds), highlight=False)
        write_environment(recipe)
        summary = _update_summary(recipe, name, outcome, seconds)
    console.print(_table(recipe, summary, names, outcomes))
    return summary


def _update_summary(recipe: Recipe, name: str, outcome: Outcome, seconds: float) -> Summary:
    """Writes what one more stage did into RUN/summary.json; the report reads it."""
    location = storage.join(recipe.run, "summary.json")
    summary: Summary = {"name": recipe.name, "stages": {}, "metrics": {}}
    if storage.exists(location):
        summary |= json.loads(storage.read_bytes(location))
    summary["name"] = recipe.name
    stages = summary["stages"] | {
        name: {
            "state": outcome.state,
            "seconds": round(seconds, 2),
            "work_seconds": round(outcome.seconds, 2),
            **({"records": outcome.outputs} if name == "ingest" else {}),
        }
    }
    summary["stages"] = {stage: stages[stage] for stage in STAGES if stage in stages}
    if "headlines" in outcome.outputs:
        summary["metrics"] = outcome.outputs["headlines"]
    storage.write_bytes(location, json.dumps(summary, indent=2, ensure_ascii=False).encode())
    return summary


def _line(name: str, outcome: Outcome, seconds: float) -> Text:
    mark, style = {"done": ("✓", "green"), "up to date": ("·", "green")}.get(
        outcome.state, ("–", "")
    )
    return Text.assemble((mark, style), f" {name:<9} {outcome.state:<12} {seconds:7.1f} s")


def _table(
    recipe: Recipe, summary: Summary, names: Sequence[str], outcomes: Mapping[str, Outcome]
) -> Table:
    table = Table(title=f"{recipe.name} → {recipe.run}", title_justify="left", expand=False)
    for column in ("stage", "state", "seconds", "made"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for name in names:
        stage = summary["stages"][name]
        made = _made(recipe, name, outcomes[name].outputs)
        table.add_row(name, stage["state"], f"{stage['seconds']:.1f}", made)
    metrics = summary["metrics"]
    if metrics:
        table.add_section()
        for metric, value in metrics.items():
            table.add_row(metric, "", "", Text(f"{value:.2f}", style="bold"))
    return table


def _made(recipe: Recipe, name: str, outputs: Mapping[str, Any]) -> str:
    """Says what a stage's outputs are, and where."""
    if name == "ingest":
        rejects = sum(outputs["rejects"].values())
        reasons = ", ".join(f"{reason} {count}" for reason, count in outputs["rejects"].items())
        changes = ", ".join(f"{outputs[change]} {change}" for change in _CHANGES)
        return (
            f"{outputs['samples']} samples ({changes}), {rejects} rejects"
            + (f" ({reasons})" if reasons else "")
            + f" in {recipe.dataset.path}"
        )
    if name == "extract":
        if not outputs:
            return "features are live: made of the pictures of each batch"
        return f"{storage.join(recipe.dataset.path, 'features', outputs['features'])}"
    if name in ("pretrain", "finetune"):
        phases = [
            f"{phase} loss {made['loss']:.3f}"
            for phase, made in outputs.items()
            if isinstance(made, dict)
        ]
        return ", ".join(phases) + f" in {storage.join(recipe.run, name)}" if phases else ""
    if name == "evaluate":
        return storage.join(recipe.run, "evaluation", "metrics.json")
    return str(outputs.get("report", ""))
