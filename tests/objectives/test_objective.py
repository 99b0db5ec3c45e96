"""How a recipe chooses objectives."""

import pytest

from pipeline import config, storage
from pipeline.errors import ConfigError
from pipeline.objectives.objective import ObjectivesConfig, by_stream


def test_the_chosen_objectives_are_built_with_their_weights() -> None:
    chosen = config.check(ObjectivesConfig, {"mlm": {"weight": 2}, "itm": {}}, "recipe")
    built = chosen.build()
    assert {objective.name: objective.weight for objective in built} == {"mlm": 2.0, "itm": 1.0}


def test_their_order_does_not_depend_on_the_recipes() -> None:
    documents: list[dict[str, dict]] = [
        {"mlm": {}, "itm": {}, "lm": {}, "mrm": {"features": {}}},
        {"lm": {}, "mrm": {"features": {}}, "itm": {}, "mlm": {}},
    ]
    for document in documents:
        built = ObjectivesConfig.model_validate(document).build()
        # itm first: it chooses the caption in which mlm hides words
        assert [objective.name for objective in built] == ["itm", "mlm", "mrm", "lm"]


def test_settings_are_plain_data_that_build_the_same() -> None:
    chosen = ObjectivesConfig.model_validate({"mlm": {"mask_fraction": 0.3}, "answer": {}})
    assert chosen.settings() == {
        "mlm": {
            "weight": 1.0,
            "texts": ["captions"],
            "mask_fraction": 0.3,
            "whole_words": False,
            "matched_only": False,
        },
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
        ({}, "no objective is given; choose from mlm, itm, mrm, itc, lm, answer, qa, distill"),
        ({"one_per_step": {"mlm": 1}}, "no objective is given"),
        ({"mlmm": {}}, "did you mean 'mlm'"),
        ({"mlm": {"mask_fraction": 1.5}}, "mlm.mask_fraction"),
        ({"itm": {"weight": 0}}, "itm.weight"),
        ({"mlm": {"texts": []}}, "mlm.texts"),
        ({"mrm": {}}, "mrm: nothing is predicted; give features, classes or attributes"),
        ({"mrm": {"features": {}, "zeroed": 0.8, "exchanged": 0.3}}, "mrm: .* exceed 1"),
        ({"mlm": {}, "itm": {}, "one_per_step": {"mlm": 1}}, "give each of them a share"),
        ({"mlm": {}, "one_per_step": {"mlm": 0}}, "one_per_step.mlm"),
        ({"distill": {"teacher": "t"}}, "distill: nothing is learned of the teacher"),
        ({"distill": {"teacher": "t", "words": {}}}, "give mlm with texts: \\[captions\\]"),
    ],
)
def test_an_impossible_choice_is_refused(document: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.check(ObjectivesConfig, document, "recipe")


def test_a_step_that_trains_one_objective_is_told_by_every_one_of_them() -> None:
    shares = {"mlm": 2, "itm": 1}
    built = ObjectivesConfig.model_validate(
        {"mlm": {"texts": ["captions", "questions"]}, "itm": {}, "one_per_step": shares}
    ).build()
    for step in range(30):
        due = [objective.name for objective in built if objective.is_due(5, step)]
        assert due in (["itm"], ["mlm", "mlm-questions"])


def test_without_turns_every_step_trains_every_objective() -> None:
    built = ObjectivesConfig.model_validate({"mlm": {}, "itm": {}}).build()
    assert all(objective.is_due(5, step) for objective in built for step in range(9))


def test_a_teachers_folder_is_told_and_made_absolute_for_other_processes() -> None:
    chosen = ObjectivesConfig.model_validate({"distill": {"teacher": "runs/t", "hidden": {}}})
    assert chosen.locations() == {"distill.teacher": "runs/t"}
    assert storage.is_absolute(str(chosen.settings()["distill"]["teacher"]))
    assert ObjectivesConfig.model_validate(chosen.settings()).build()[0].name == "distill"
