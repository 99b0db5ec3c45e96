"""The scores of a run: tiles of headline numbers, rows of question types."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
BLIND = "_blind"  # the end of a metric's name when the twin without pictures made it
QUESTION_TYPE = "vqa/accuracy/"  # the start of a metric's name when it is of one question type


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
class TypeRow:
    """One question type's accuracies, in percent, and their texts."""

    name: str
    model: float
    blind: float | None


def tiles(metrics: Mapping[str, float], names: Sequence[str]) -> list[Tile]:
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


def type_rows(metrics: Mapping[str, float]) -> list[TypeRow]:
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
