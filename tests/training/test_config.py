"""What settings of training are refused, and what they come to."""

import pytest

from pipeline import config
from pipeline.errors import ConfigError
from pipeline.training.config import TrainingConfig

SIZES = {
    "steps": 10,
    "global_batch_size": 24,
    "micro_batch_size": 2,
}


def check(**settings: object) -> TrainingConfig:
    return config.check(TrainingConfig, {**SIZES, **settings}, "training")


def test_each_rank_accumulates_what_is_left_of_the_global_batch() -> None:
    assert check().accumulation_steps(world_size=3) == 4
    assert check().accumulation_steps(world_size=5) == 3  # of 5 samples, or of 4


def test_shares_of_any_number_of_ranks_are_the_global_batch_in_order() -> None:
    for world_size in range(1, 25):
        shares = [check().share(rank, world_size) for rank in range(world_size)]
        assert [place for share in shares for place in share] == list(range(24))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_rank_without_a_sample_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"24 leaves some of 25 ranks without a sample"):
        check().accumulation_steps(world_size=25)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"micro_batch_size": 25}, "25 is more than global_batch_size=24"),
        ({"schedule": {"warmup_steps": 11}}, "more than steps=10"),
        ({"zero_stage": 0, "precision": "bf16"}, "use zero_stage=1"),
        ({"zero_stage": 0, "precision": "fp16"}, "use zero_stage=1"),
        ({"zero_stage": 4}, "zero_stage"),
        (
            {"deepspeed": {"zero_optimization": {"offload_param": {"device": "cpu"}}}},
            "no effect with zero_stage=1; use 3 or more",
        ),
        ({"model_weights": "average"}, "set optimizer.ema_decay"),
        ({"optimizer": {"ema_decay": 1.0}}, "ema_decay"),
        (
            {"evaluation": {"patience": 3}},
            "patience goes by evaluations: set evaluation.every_steps",
        ),
        ({"evaluation": {"restore_best": True}}, "evaluation.restore_best goes by evaluations"),
        ({"not_finite": "ignore"}, "not_finite"),
        ({"deepspeed": {"fp16": {"enabled": True}}}, "decided by precision"),
        ({"checkpoints": {"keep_last": 1}}, "checkpoints.keep_last"),
        ({"deepspeed": {"train_batch_size": 8}}, "decided by global_batch_size"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "decided by zero_stage"),
        ({"loading": {"tokens_per_micro_batch": 90, "group_by_length": True}}, "groups by length"),
        ({"optimizer": {"learning_rat": 1}}, "did you mean 'learning_rate'"),
    ],
)
def test_an_impossible_setting_is_refused(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check(**settings)


def test_auto_precision_is_fp32_on_a_cpu_and_bf16_on_a_gpu() -> None:
    assert check().resolved_precision("cpu") == "fp32"
    assert check().resolved_precision("cuda:1") == "bf16"
    with pytest.raises(ConfigError, match="use zero_stage=1"):
        check(zero_stage=0).resolved_precision("cuda:1")
