import json
from typing import Any

import pytest

from pipeline.config import Change, Config, change_of, settings
from pipeline.training.config import TrainingConfig
from pipeline.training.continuation import differences, fixed
from pipeline.training.spec import TrainingSpec
from tests.training import flat_settings
from tests.training.stand_in import make_spec


@pytest.mark.parametrize(
    ("config", "name"),
    [(config, name) for config in (TrainingConfig, TrainingSpec) for name in settings(config)],
)
def test_every_setting_says_whether_a_run_may_go_on_with_another(
    config: type[Config], name: str
) -> None:
    assert change_of(config, name) in Change


def test_each_class_has_the_settings_that_it_is_for() -> None:
    def of(change: Change) -> set[str]:
        keys = settings(TrainingConfig)
        return {key for key in keys if change_of(TrainingConfig, key) is change}

    assert {"loading.threads", "log_every_steps", "checkpoints.keep_last"} <= of(Change.FREELY)
    assert {"checkpoints.every_steps", "timeout_seconds", "not_finite"} <= of(Change.FREELY)
    on_request = {"steps", "precision", "optimizer.learning_rate", "optimizer.weight_decay"}
    on_request |= {"schedule.warmup_steps", "schedule.decay"}
    evaluation = {f"evaluation.{name}" for name in ("every_steps", "patience", "restore_best")}
    assert on_request | evaluation <= of(Change.ON_REQUEST)
    assert of(Change.NEVER) == {
        "global_batch_size",
        "loading.shuffle_window_shards",
        "optimizer.freeze",
        "optimizer.ema_decay",
    }
    assert change_of(TrainingSpec, "model") is Change.NEVER
    assert change_of(TrainingSpec, "seed") is Change.NEVER
    assert change_of(TrainingSpec, "folder") is Change.FREELY


def told(now: TrainingSpec, then: TrainingSpec | None = None) -> list[str]:
    before = (then or make_spec("here")).reproducibility_key()
    return [str(one) for one in differences(before, now.reproducibility_key(), now.phase)]


def changed(**fields: Any) -> TrainingSpec:
    return make_spec("there").model_copy(update=fields)


def test_what_differs_is_named_by_the_recipes_key_with_both_values() -> None:
    now = make_spec(
        "there",
        optimizer={"learning_rate": 0.5, "freeze": ["*.bias"]},
        log_every_steps=9,
        zero_stage=3,
    )
    assert told(now) == [
        'training.pretrain.optimizer.freeze: [] then, ["*.bias"] now',
        "training.pretrain.optimizer.learning_rate: 0.02 then, 0.5 now",
    ]
    assert told(changed(seed=3)) == ["training.seed: 11 then, 3 now"]
    assert told(changed(model={"width": 8})) == ["model.sizes.width: null then, 8 now"]
    blind = changed(phase="blind", objectives={"lm": {"weight": 0.5}})
    before = changed(phase="blind", objectives={"lm": {"weight": 1.0}})
    assert told(blind, before) == ["benchmarks.caption.lm.weight: 1.0 then, 0.5 now"]
    many = changed(answers=("a", "b", "c", "d", "e"))
    assert told(many) == ["benchmarks.vqa: answers: [] then, 5 entries now"]
    assert told(make_spec("there")) == []


def test_content_is_told_apart_wherever_it_lies() -> None:
    data = "dataset.path: split train"
    before = changed(contents={data: "0" * 32, "model.vocab_size": "400"})
    assert told(before, before.model_copy(update={"tokenizer": "/elsewhere"})) == []
    now = changed(contents={data: "1" * 32, "model.vocab_size": "500"})
    assert told(now, before) == [
        f"{data}: what is there has changed",
        "model.vocab_size: 400 then, 500 now",
    ]
    assert told(now, changed()) == []  # nobody recorded it
    assert (
        len(fixed(differences(before.reproducibility_key(), now.reproducibility_key(), "pretrain")))
        == 2
    )


def test_a_run_that_begins_to_evaluate_is_told_so_once() -> None:
    data = {"dataset.path: split train": "0" * 32}
    before = changed(contents=data)
    now = make_spec("there", evaluation={"every_steps": 2, "patience": 3})
    held_out = {"held_out_split": "validation", "contents": data | {"dataset.path: split v": "1"}}
    assert told(now.model_copy(update=held_out), before) == [
        "training.pretrain.evaluation.every_steps: null then, 2 now",
        "training.pretrain.evaluation.patience: null then, 3 now",
    ]


def test_how_evaluations_are_made_is_compared_only_where_there_are_any() -> None:
    assert told(make_spec("there", evaluation={"examples": 3, "best_by": "recall"})) == []
    before = make_spec("here", evaluation={"every_steps": 2})
    now = make_spec("there", evaluation={"every_steps": 2, "examples": 3})
    assert told(now, before) == ["training.pretrain.evaluation.examples: null then, 3 now"]


def test_a_setting_that_an_older_release_did_not_have_is_not_compared() -> None:
    before = make_spec("here").reproducibility_key()
    del before["training"]["precision"], before["contents"]
    before["training"]["gone"] = 1
    assert (
        differences(before, make_spec("here", precision="fp32").reproducibility_key(), "pretrain")
        == ()
    )


def test_settings_that_were_recorded_without_groups_are_compared_by_what_they_are_called_now() -> (
    None
):
    flat = json.loads(flat_settings.TRAINING)
    then = make_spec("here").reproducibility_key() | {"training": flat}
    now = make_spec(
        "here",
        optimizer={
            "ema_decay": 0.9,
            "freeze": ["unused.*"],
            "learning_rate_factors": {"hidden.*": 0.3},
        },
        evaluation={
            "every_steps": 2,
            "examples": 3,
            "best_by": "sq",
            "patience": 7,
            "restore_best": True,
        },
        loading={"group_by_length": True, "shuffle_window_shards": 9},
        model_weights="average",
    )
    assert set(flat) == {
        *TrainingConfig.moved,
        *(key for key in settings(TrainingConfig) if "." not in key),
    }
    assert [str(one) for one in differences(then, now.reproducibility_key(), "pretrain")] == [
        "training.pretrain.loading.shuffle_window_shards: 8 then, 9 now"
    ]
