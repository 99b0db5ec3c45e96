"""The report of a run, RUN/report.html: one page that shows what came of it."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline import storage
from pipeline.errors import StageError
from pipeline.report.curves import Chart, Role, chart
from pipeline.report.examples import FILE as EXAMPLES_FILE
from pipeline.report.examples import Example, Gallery, read_gallery
from pipeline.report.heat import Heat, attention_heat
from pipeline.report.inline_image import InlineImage, inline_image, shared_ratio
from pipeline.report.page import duration, render
from pipeline.report.phase_metrics import PhaseMetrics
from pipeline.training.tracking.metrics_log import METRICS as METRICS_FILE
from pipeline.training.tracking.metrics_log import Stretch

PHASES = {
    "pretrain": "Pretraining",
    "finetune": "Fine-tuning",
    "blind": "The blind twin",
}
# Names of metrics with their title, unit and meaning; accuracies are in percent, as their
# official evaluators print them.
METRICS = {
    "vqa/accuracy": ("VQA accuracy", "%", "Of the answers, by the official VQA rule."),
    "caption/cider": ("CIDEr", "", "Captions against people's, by shared rare phrases."),
    "caption/bleu4": ("BLEU-4", "", "Four-word phrases shared with people's captions."),
    "caption/bleu3": ("BLEU-3", "", "Three-word phrases shared."),
    "caption/bleu2": ("BLEU-2", "", "Two-word phrases shared."),
    "caption/bleu1": ("BLEU-1", "", "Words shared."),
    "caption/rouge-l": ("ROUGE-L", "", "Longest run of words shared with a person's caption."),
    "caption/meteor": ("METEOR", "", "Words matched by stem and synonym."),
}
# What readers call the families, extractors and objectives; others go by their own name.
FAMILIES = {"visualbert": "VisualBERT", "lxmert": "LXMERT", "vilbert": "ViLBERT"}
EXTRACTORS = {
    "pixels": "raw pixels",
    "grid": "a grid of frozen CNN features",
    "regions": "regions found by a frozen detector",
    "segments": "segments found by a frozen Mask R-CNN",
    "patches": "patch tokens of a frozen vision transformer",
    "imported": "published features",
}
OBJECTIVES = {
    "mlm": "masked words",
    "itm": "image–text matching",
    "lm": "next words",
    "mrm": "masked regions",
    "itc": "image–text contrast",
    "qa": "questions",
    "distill": "a teacher's outputs",
    "answer": "answers",
    "vqa": "answers",
    "caption": "captions",
}
BLIND = "_blind"  # the end of a metric's name when the twin without pictures made it
QUESTION_TYPE = "vqa/accuracy/"  # the start of a metric's name when it is of one question type
SMALL_CHARTS = (
    ("lr", "Learning rate", "", 1.0, False),
    ("samples_per_second", "Samples per second", "", 1.0, True),
    ("data_wait_fraction", "Waiting for data", "%", 100.0, True),
    ("grad_norm", "Gradient norm", "", 1.0, True),
)
FIRST_EXAMPLES = {"vqa": 8, "caption": 8}  # of each kind; the others wait in a fold


@dataclass(frozen=True)
class Tile:
    """A headline number. `model` and `blind` are lengths of bars in percent, where it has any."""

    title: str
    value: str
    unit: str
    exact: str
    meaning: str
    model: float | None = None
    blind: float | None = None
    blind_value: str = ""
    gain: str = ""


@dataclass(frozen=True)
class StageRow:
    name: str
    state: str
    time: str
    share: float  # of the longest stage, in percent


@dataclass(frozen=True)
class TypeRow:
    """One question type's accuracies, in percent, and their texts."""

    name: str
    model: float
    blind: float | None


@dataclass(frozen=True)
class PhaseCharts:
    title: str
    about: str
    losses: tuple[Chart, ...]
    small: tuple[Chart, ...]
    stretches: tuple[Stretch, ...]


@dataclass(frozen=True)
class Card:
    """An example ready to be drawn."""

    example: Example
    picture: InlineImage
    heat: Heat | None
    num_layers: int
    first_token: int
    people: str
    labels: str  # what the filter may ask for: right, wrong, picture


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


def _values(run: Run) -> dict[str, Any]:
    cards = [_card(example) for example in run.gallery.examples] if run.gallery else []
    shown = {kind: [card for card in cards if card.example.kind == kind] for kind in FIRST_EXAMPLES}
    headlines = [name for name in run.headlines or METRICS if name in run.metrics]
    return {
        "run": run,
        "sentence": _sentence(run),
        "tiles": _tiles(run.metrics, headlines),
        "questions": shown["vqa"],
        "captions": shown["caption"],
        "ratios": {
            kind: shared_ratio([card.picture for card in of_kind])
            for kind, of_kind in shown.items()
        },
        "first": FIRST_EXAMPLES,
        "num_layers": max((card.num_layers for card in cards), default=0),
        "phases": _phases(run.phases),
        "types": _types(run.metrics),
        "stages": _stages(run.stages),
        "total_time": duration(sum(float(row["seconds"]) for row in run.stages.values())),
        "environment": _flat(
            {key: value for key, value in (run.environment or {}).items() if key != "stretches"}
        ),
    }


def _tiles(metrics: Mapping[str, float], names: Sequence[str]) -> list[Tile]:
    tiles = []
    for name in names:
        if name.endswith(BLIND) and name.removesuffix(BLIND) in names:
            continue  # shown in the tile of the model that sees
        title, unit, meaning = METRICS.get(name, (name, "", ""))
        value, blind = metrics[name], metrics.get(name + BLIND)
        digits = 2 if unit == "%" else 3  # as the official evaluators print them
        bars = blind is not None and unit == "%"
        tiles.append(
            Tile(
                title=title,
                value=f"{value:.{digits}f}",
                unit=unit,
                exact=f"{name} = {value!r}",
                meaning=meaning,
                model=value if bars else None,
                blind=blind if bars else None,
                blind_value="" if blind is None else f"{blind:.{digits}f}",
                gain="" if blind is None else f"{value - blind:+.{digits}f}",
            )
        )
    return tiles


def _types(metrics: Mapping[str, float]) -> list[TypeRow]:
    blind_start = QUESTION_TYPE.rstrip("/") + BLIND + "/"
    rows = [
        TypeRow(
            name=name.removeprefix(QUESTION_TYPE),
            model=value,
            blind=metrics.get(blind_start + name.removeprefix(QUESTION_TYPE)),
        )
        for name, value in metrics.items()
        if name.startswith(QUESTION_TYPE)
    ]
    return sorted(rows, key=lambda row: (-row.model, row.name))


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


def _phases(phases: Mapping[str, PhaseMetrics]) -> list[PhaseCharts]:
    """Makes the charts; the twin's losses are drawn into those of fine-tuning, if there are any."""
    blind = phases.get("blind")
    groups = []
    for name, metrics in phases.items():
        if name == "blind" and "finetune" in phases:
            continue
        twin = blind if name == "finetune" else None
        role: Role = "blind" if name == "blind" else "model"
        objectives = list(dict.fromkeys(metrics.objectives() + (twin.objectives() if twin else [])))
        losses = []
        for objective in objectives:
            series = [metrics.loss(objective, "model", role)]
            if twin:
                series.append(twin.loss(objective, "blind twin", "blind"))
            title = f"Loss: {OBJECTIVES.get(objective, objective)}"
            losses.append(chart(title, series, stretches=metrics.stretches))
        if len(objectives) != 1 and metrics.has("loss"):
            series = [metrics.value("loss", "model", role)]
            if twin:
                series.append(twin.value("loss", "blind twin", "blind"))
            losses.append(chart("Loss: total", series, stretches=metrics.stretches))
        small = [
            chart(
                title,
                [metrics.value(key, title, role, scale)],
                unit=unit,
                from_zero=from_zero,
                smooth=key != "lr",
                stretches=metrics.stretches,
            )
            for key, title, unit, scale, from_zero in SMALL_CHARTS
            if metrics.has(key)
        ]
        about = f"{len(metrics.steps):,} steps recorded"
        if twin:
            about += f", and {len(twin.steps):,} of the blind twin"
        shown = PhaseCharts(PHASES[name], about, tuple(losses), tuple(small), metrics.stretches)
        groups.append(shown)
    return groups


def _card(example: Example) -> Card:
    attention = example.attention
    first_token = 0
    if attention is not None:  # begin with the word that looked hardest at one place
        first_token = int(attention.weights[-1].max(axis=1).argmax())
    labels = []
    if example.score is not None and example.kind == "vqa":
        labels.append("right" if example.score > 0 else "wrong")
        if example.blind_score is not None and example.score > example.blind_score:
            labels.append("picture")
    return Card(
        example=example,
        picture=inline_image(example.image),
        heat=attention_heat(attention) if attention else None,
        num_layers=len(attention.weights) if attention else 0,
        first_token=first_token,
        people=_people(example.references),
        labels=" ".join(labels),
    )


def _people(answers: Sequence[str]) -> str:
    """Writes equal answers once, with how many people gave them: `red ×8, dark red ×2`."""
    counts = Counter(answers).most_common()
    return ", ".join(
        f"{answer} ×{count}" if len(answers) > 1 else answer for answer, count in counts
    )


def _sentence(run: Run) -> str:
    """Says what the run is, from its recipe and curves; what they do not tell is left out."""
    recipe = run.recipe or {}
    family = _at(recipe, "model", "family")
    source = _at(recipe, "dataset", "source", "type")
    extractor = _at(recipe, "features", "extractor", "type") or _at(recipe, "features", "type")
    steps = [
        f"{doing} on {_and([OBJECTIVES.get(name, name) for name in names])} "
        f"for {run.phases[phase].steps[-1]:,} steps"
        for phase, doing in (("pretrain", "pretrained"), ("finetune", "fine-tuned"))
        if phase in run.phases and (names := run.phases[phase].objectives())
    ]
    opening = FAMILIES.get(family, family) if family else "A model"
    if extractor == "grid" and _at(recipe, "features", "live"):
        opening += " reading a grid of its own CNN's features"
    elif extractor:
        opening += f" reading {EXTRACTORS.get(extractor, extractor)}"
    if source:
        opening += f" of the {source} dataset"
    ending = "; beside it, a blind twin that never saw a picture" if "blind" in run.phases else ""
    return ", ".join([opening, *steps]) + ending + "."


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _at(document: Mapping[str, Any], *path: str) -> Any:
    node: Any = document
    for name in path:
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


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
