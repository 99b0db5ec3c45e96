from pathlib import Path

import pytest

from pipeline.errors import FeatureError
from pipeline.stages.data_inputs import DataInputs
from tests.stages.small_recipe import small


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
