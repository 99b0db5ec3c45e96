"""The files of a run, read for its report."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline import storage
from pipeline.errors import StageError
from pipeline.report.examples import FILE as EXAMPLES_FILE
from pipeline.report.examples import Gallery, read_gallery
from pipeline.report.phase_metrics import PhaseMetrics
from pipeline.report.titles import PHASES
from pipeline.training.tracking.metrics_log import METRICS as METRICS_FILE


@dataclass(frozen=True)
class Run:
    """What RUN holds; None or empty where it does not yet."""

    name: str
    recipe: dict[str, Any] | None
    recipe_text: str
    environment: dict[str, Any] | None
    stages: Mapping[str, Mapping[str, Any]]
    metrics: Mapping[str, float]
    headlines: tuple[str, ...]  # the metrics that summary.json names
    phases: Mapping[str, PhaseMetrics]
    gallery: Gallery | None
    notices: tuple[str, ...]  # what is missing or does not fit


def read_run(run: str) -> Run:
    """Reads what the report shows of a run; raises StageError if there is nothing of a run."""
    summary = _json(run, "summary.json")
    environment = _json(run, "environment.json")
    evaluated = _json(run, "evaluation", "metrics.json")
    recipe, recipe_text = _recipe(run)
    phases = {
        phase: PhaseMetrics.read(run, phase)
        for phase in PHASES
        if storage.exists(storage.join(run, phase, METRICS_FILE))
    }
    has_gallery = storage.exists(storage.join(run, *EXAMPLES_FILE))
    if not (summary or environment or evaluated or recipe or phases or has_gallery):
        raise StageError(
            f"{run}: no recipe.yaml, environment.json, summary.json, metrics.jsonl or evaluation "
            "found; give the folder of a run (`run` in the recipe)"
        )
    summary_metrics = _numbers((summary or {}).get("metrics", {}))
    metrics = _numbers(evaluated or {})
    training = (recipe or {}).get("training", {})
    planned = {
        "pretrain": training.get("pretrain", True) is not None,
        "finetune": True,
        "blind": training.get("blind_twin", True),
    }
    absent_phases = {name for name in PHASES if planned[name] and name not in phases}
    missing = {
        "no recipe (recipe.yaml)": recipe is None,
        "no environment (environment.json)": environment is None,
        "no closing summary (summary.json): the run has not come to its end": summary is None,
        "no pretraining curve (pretrain/metrics.jsonl)": "pretrain" in absent_phases,
        "no fine-tuning curve (finetune/metrics.jsonl)": "finetune" in absent_phases,
        "no blind twin's curve (blind/metrics.jsonl)": "blind" in absent_phases,
        "no scores (evaluation/metrics.json)": evaluated is None,
        "no pictures with predictions (evaluation/examples.json)": not has_gallery,
    }
    notices = [text for text, absent in missing.items() if absent]
    notices += [
        f"{phase}/metrics.jsonl ends in half a line, which is left out"
        for phase, of_phase in phases.items()
        if of_phase.is_cut_short
    ]
    notices += [
        f"summary.json gives {name} as {value:g}, evaluation/metrics.json as {metrics[name]:g}; "
        "the latter is shown"
        for name, value in summary_metrics.items()
        if name in metrics and metrics[name] != value
    ]
    return Run(
        name=run.rstrip("/").rsplit("/", 1)[-1],
        recipe=recipe,
        recipe_text=recipe_text,
        environment=environment,
        stages=(summary or {}).get("stages", {}),
        metrics={**summary_metrics, **metrics},
        headlines=tuple(summary_metrics),
        phases=phases,
        gallery=read_gallery(run) if has_gallery else None,
        notices=tuple(notices),
    )


def _numbers(document: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in document.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _json(run: str, *names: str) -> dict[str, Any] | None:
    """Returns the object in a JSON file, None if there is no file; raises StageError if damaged."""
    location = storage.join(run, *names)
    if not storage.exists(location):
        return None
    try:
        document = json.loads(storage.read_bytes(location))
    except ValueError as error:
        raise StageError(f"{location}: not valid JSON ({error})") from error
    if not isinstance(document, dict):
        raise StageError(f"{location}: expected an object, found {type(document).__name__}")
    return document


def _recipe(run: str) -> tuple[dict[str, Any] | None, str]:
    location = storage.join(run, "recipe.yaml")
    if not storage.exists(location):
        return None, ""
    try:
        text = storage.read_bytes(location).decode()
        document = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StageError(f"{location}: not valid YAML ({error})") from error
    if not isinstance(document, dict):
        raise StageError(f"{location}: expected a mapping, found {type(document).__name__}")
    return document, text
