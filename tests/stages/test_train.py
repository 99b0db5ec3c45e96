from pathlib import Path

import pytest
from rich.console import Console

from pipeline.errors import ConfigError, StageError
from pipeline.stages.changed import OnChange
from pipeline.stages.progress import StageProgress
from pipeline.stages.train import finetune, pretrain, refuse_changes
from tests.stages.small_recipe import small

QUIET = Console(stderr=True, quiet=True)
REFUSE = OnChange("refuse")


def test_what_the_recipe_does_not_ask_for_is_not_trained(extracted: Path) -> None:
    recipe = small(extracted, "training.pretrain=null", "objectives=null")
    with StageProgress(QUIET, "pretrain") as progress:
        assert pretrain(recipe, progress).state == "not in the recipe"
    assert not (extracted / "run" / "pretrain").exists()


def test_nothing_is_fine_tuned_before_it_is_pretrained(extracted: Path) -> None:
    with (
        StageProgress(QUIET, "finetune") as progress,
        pytest.raises(StageError, match="no pretrained model; run `sightline pretrain`"),
    ):
        finetune(small(extracted), progress)


def test_changed_settings_are_refused_before_the_stage_begins(finished: Path) -> None:
    refuse_changes(small(finished), "pretrain", REFUSE)
    changed = small(finished, "training.seed=5")
    with pytest.raises(ConfigError, match=r"training\.seed"):
        refuse_changes(changed, "pretrain", REFUSE)
    refuse_changes(changed, "ingest", REFUSE)
    refuse_changes(changed, "pretrain", OnChange("restart"))
