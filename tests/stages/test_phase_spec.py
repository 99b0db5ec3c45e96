from pathlib import Path

from pipeline.stages.data_inputs import DataInputs
from pipeline.stages.phase_spec import phase_specs
from tests.stages.small_recipe import small


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
