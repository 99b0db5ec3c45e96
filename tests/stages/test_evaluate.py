import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pipeline.data.read.dataset import Dataset
from pipeline.errors import StageError
from pipeline.stages import evaluate
from pipeline.stages.progress import StageProgress
from pipeline.stages.state import Outcome
from tests.stages.small_recipe import small

QUIET = Console(stderr=True, quiet=True)


def evaluated(folder: Path, *overrides: str) -> Outcome:
    with StageProgress(QUIET, "evaluate") as progress:
        return evaluate.run(small(folder, *overrides), progress)


def results(folder: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        (folder / "run" / "evaluation" / f"{name}.results.json").read_text()
    )
    return found


def test_every_held_out_question_and_picture_has_one_result(finished: Path) -> None:
    split = Dataset.open(str(finished / "data")).split("validation")
    texts = split.texts(np.arange(split.num_samples))
    questions = sorted(one.question_id for each in texts for one in each.questions)
    for twin in ("", "_blind"):
        asked = [row["question_id"] for row in results(finished, f"vqa{twin}")]
        shown = [row["image_id"] for row in results(finished, f"caption{twin}")]
        assert sorted(asked) == questions
        assert sorted(shown) == sorted(each.image_id for each in texts)


def test_it_is_done_once_for_one_model_and_again_when_its_figures_are_gone(finished: Path) -> None:
    first = evaluated(finished)
    assert first.state == "up to date"
    figures = finished / "run" / "evaluation" / "metrics.json"
    before = json.loads(figures.read_text())
    figures.unlink()
    again = evaluated(finished)
    assert (again.state, json.loads(figures.read_text())) == ("done", before)
    assert again.outputs["headlines"].items() <= before.items()


def test_without_the_twin_its_figures_are_not_asked_for(finished: Path) -> None:
    done = evaluated(finished, "training.blind_twin=false")
    assert done.state == "done"
    assert set(done.outputs["headlines"]) == {"vqa/accuracy", "caption/cider", "caption/bleu4"}


def test_nothing_is_scored_before_it_is_trained(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no model; run `sightline finetune`"):
        evaluated(finished, f"run={tmp_path / 'none'}")
