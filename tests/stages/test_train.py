from pathlib import Path

import pytest
from rich.console import Console

from pipeline.errors import ConfigError, FeatureError, StageError
from pipeline.stages.changed import OnChange
from pipeline.stages.progress import StageProgress
from pipeline.stages.run import run_stages
from pipeline.stages.train import DataInputs, finetune, phase_specs, pretrain, refuse_changes
from tests.stages.small_recipe import small

QUIET = Console(stderr=True, quiet=True)
REFUSE = OnChange("refuse")


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small recipe's data, and no run."""
    folder = tmp_path_factory.mktemp("extracted")
    run_stages(small(folder), ["ingest", "extract"], QUIET)
    return folder


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


def test_features_that_are_not_there_are_named_with_the_command(extracted: Path) -> None:
    finer = "features.extractor.image_size=48", "features.extractor.patch_size=8"
    with pytest.raises(FeatureError, match="sightline extract"):
        DataInputs.open(small(extracted, *finer))


def test_identity_is_of_the_content_and_no_place_in_history(extracted: Path) -> None:
    inputs = DataInputs.open(small(extracted))
    train, both = inputs.identity("train"), inputs.identity("train", "validation")
    assert train["content"].items() <= both["content"].items()
    assert "version" not in str(train)
    assert inputs.passed_over == {"train": 0, "validation": 0}


def test_a_spec_names_all_that_decides_its_curve(extracted: Path) -> None:
    def key(*overrides: str) -> dict[str, object]:
        recipe = small(extracted, *overrides)
        (spec,) = (
            one for one in phase_specs(recipe, DataInputs.open(recipe)) if one.phase == "pretrain"
        )
        return dict(spec.reproducibility_key())

    as_before = key()
    assert key(f"run={extracted / 'elsewhere'}") == as_before
    assert key("training.pretrain.checkpoints.keep_last=9") == as_before
    for change in ("training.seed=5", "model.max_tokens=20", "training.pretrain.steps=4"):
        assert key(change) != as_before, change


def test_changed_settings_are_refused_before_the_stage_begins(finished: Path) -> None:
    refuse_changes(small(finished), "pretrain", REFUSE)
    changed = small(finished, "training.seed=5")
    with pytest.raises(ConfigError, match=r"training\.seed"):
        refuse_changes(changed, "pretrain", REFUSE)
    refuse_changes(changed, "ingest", REFUSE)
    refuse_changes(changed, "pretrain", OnChange("restart"))
