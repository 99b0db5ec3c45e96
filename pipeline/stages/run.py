"""The stages of a recipe in order, and a table of what they made."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import config, storage
from pipeline.cluster import connection
from pipeline.errors import ConfigError, LostError
from pipeline.recipe import RECORD, Recipe
from pipeline.stages import evaluate, extract, ingest, report, train
from pipeline.stages.changed import OnChange
from pipeline.stages.environment import write_environment
from pipeline.stages.preflight import preflight, require_writable
from pipeline.stages.progress import StageProgress
from pipeline.stages.state import Outcome
from pipeline.training.lease import IsLost, only_command

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
    recipe: Recipe,
    names: Sequence[str],
    console: Console,
    on_change: OnChange = train.REFUSE,
    allow_removals: bool = False,
) -> Summary:
    """Runs the named stages and returns what RUN/summary.json then holds.

    `stages` has for each stage its state and seconds in this command, and `work_seconds`, what
    the work took when it was done; for ingest also `records`, what it found. `on_change` says what
    is done about a phase that was begun with other settings; `allow_removals` is for ingest.
    Raises ConfigError before any work if a file is missing, BusyError if another command is at work
    in the run's folder, and LostError if one has taken it over.
    """
    stages: dict[str, Callable[[Recipe, StageProgress], Outcome]] = {
        **STAGES,
        "ingest": partial(ingest.run, allow_removals=allow_removals),
        "pretrain": partial(train.pretrain, on_change=on_change),
        "finetune": partial(train.finetune, on_change=on_change),
    }
    preflight(recipe, names)
    require_writable(recipe.run)
    with _alone_in(recipe.run, console) as is_lost:
        for name in names:
            train.refuse_changes(recipe, name, on_change)
        outcomes: dict[str, Outcome] = {}
        with _recorded(recipe, outcomes):
            for name in names:
                started = time.monotonic()
                with StageProgress(console, name) as progress, _environment_left(recipe, is_lost):
                    connection.tell = progress.note
                    outcome = stages[name](recipe, progress)
                outcomes[name] = outcome
                seconds = time.monotonic() - started
                console.print(_line(name, outcome, seconds), highlight=False)
                summary = _update_summary(recipe, name, outcome, seconds)
    console.print(_table(recipe, summary, names, outcomes))
    return summary


@contextlib.contextmanager
def _alone_in(run: str, console: Console) -> Iterator[IsLost]:
    """Keeps other commands out of the run; under torchrun rank 0 does so for all of them."""
    if os.environ.get("RANK", "0") != "0":
        yield lambda: False
        return
    with only_command(run, lambda text: console.print(text, style="dim")) as is_lost:
        yield is_lost


@contextlib.contextmanager
def _environment_left(recipe: Recipe, is_lost: IsLost) -> Iterator[None]:
    """Leaves RUN/environment.json, also where training failed or was stopped in the block.

    Raises LostError, and writes nothing more, if the run is another command's by then.
    """
    try:
        yield
    except (ConfigError, LostError):  # nothing was done, or it is no longer ours
        raise
    except BaseException:
        if not is_lost():
            write_environment(recipe)
        raise
    if is_lost():
        raise LostError(
            f"{recipe.run}: taken over by another command, or taken away, while this one was at "
            "work; nothing more is written"
        )
    write_environment(recipe)


@contextlib.contextmanager
def _recorded(recipe: Recipe, outcomes: Mapping[str, Outcome]) -> Iterator[None]:
    """Leaves the recipe in RUN; the one before stays if this one is refused before it made any."""
    location = storage.join(recipe.run, RECORD)
    before = storage.read_bytes(location) if storage.exists(location) else None
    storage.write_bytes(location, config.to_yaml(recipe).encode())
    try:
        yield
    except ConfigError:
        made = {name for name, outcome in outcomes.items() if outcome.state == "done"}
        if before is not None and not made & {"pretrain", "finetune", "evaluate"}:
            storage.write_bytes(location, before)
        raise


def _update_summary(recipe: Recipe, name: str, outcome: Outcome, seconds: float) -> Summary:
    """Writes what one more stage did into RUN/summary.json; the report reads it."""
    location = storage.join(recipe.run, "summary.json")
    summary: Summary = {"name": recipe.name, "stages": {}, "metrics": {}}
    if storage.exists(location):
        with contextlib.suppress(ValueError):  # one that nobody can read is written anew
            before = json.loads(storage.read_bytes(location))
            if isinstance(before, dict):
                summary |= {
                    part: before[part]
                    for part in ("stages", "metrics")
                    if isinstance(before.get(part), dict)
                }
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
    storage.write_bytes(
        location, json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False).encode()
    )
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
        place = storage.join(recipe.dataset.path, "features", outputs["features"])
        rejects = outputs.get("rejects") or {}
        reasons = ", ".join(f"{reason} {count}" for reason, count in rejects.items())
        return place + (f", {sum(rejects.values())} samples without ({reasons})" if rejects else "")
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
