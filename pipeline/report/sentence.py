"""The sentence that says what a run is."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.run_files import Run
from pipeline.report.titles import EXTRACTORS, FAMILIES, OBJECTIVES


def sentence(run: Run) -> str:
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
