"""How a recipe chooses objectives."""

import pytest

from pipeline import config
from pipeline.errors import ConfigError
from pipeline.objectives.objective import ObjectivesConfig, by_stream


def test_the_chosen_objectives_are_built_with_their_weights() -> None:
    chosen = config.check(ObjectivesConfig, {"mlm": {"weight": 2}, "itm": {}}, "recipe")
    built = chosen.build()
    assert {objective.name: objective.weight for objective in built} == {"mlm": 2.0, "itm": 1.0}


def test_their_order_does_not_depend_on_the_recipes() -> None:
    documents: list[dict[str, dict]] = [
        {"mlm": {}, "itm": {}, "lm": {}},
        {"lm": {}, "itm": {}, "mlm": {}},
    ]
    for document in documents:
        built = ObjectivesConfig.model_validate(document).build()
        # itm first: it chooses the caption in which mlm hides words
        assert [objective.name for objective in built] == ["itm", "mlm", "lm"]


def test_settings_are_plain_data_that_build_the_same() -> None:
    chosen = ObjectivesConfig.model_validate({"mlm": {"mask_fraction": 0.3}, "answer": {}})
    assert chosen.settings() == {
        "mlm": {"weight": 1.0, "mask_fraction": 0.3},
        "answer": {"weight": 1.0},
    }
    assert ObjectivesConfig.model_validate(chosen.settings()) == chosen


def test_objectives_are_grouped_by_the_pass_they_share() -> None:
    built = ObjectivesConfig.model_validate({"mlm": {}, "itm": {}, "lm": {}, "answer": {}}).build()
    groups = {name: [one.name for one in group] for name, group in by_stream(built).items()}
    assert groups == {
        "captions-full": ["itm", "mlm"],
        "captions-prefix": ["lm"],
        "questions-full": ["answer"],
    }


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "no objective is given; choose from mlm, itm, lm, answer"),
        ({"mml": {}}, "did you mean 'mlm'"),
        ({"mlm": {"mask_fraction": 1.5}}, "mlm.mask_fraction"),
        ({"itm": {"weight": 0}}, "itm.weight"),
    ],
)
def test_an_impossible_choice_is_refused(document: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.check(ObjectivesConfig, document, "recipe")
