from pathlib import Path

import pytest

from pipeline import config
from pipeline.errors import ConfigError
from pipeline.training.spec import TrainingConfig
from tests.training.stand_in import make_spec

SIZES = {"steps": 10, "global_batch_size": 24, "micro_batch_size": 2, "learning_rate": 1e-3}


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
        ({"warmup_steps": 11}, "more than steps=10"),
        ({"zero_stage": 0, "precision": "bf16"}, "use zero_stage=1"),
        ({"zero_stage": 0, "precision": "fp16"}, "use zero_stage=1"),
        ({"zero_stage": 4}, "zero_stage"),
        (
            {"deepspeed": {"zero_optimization": {"offload_param": {"device": "cpu"}}}},
            "no effect with zero_stage=1; use 3 or more",
        ),
        ({"model_weights": "average"}, "set ema_decay"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"patience": 3}, "patience goes by evaluations: set evaluate_every_steps"),
        ({"keep_best": True}, "keep_best goes by evaluations"),
        ({"not_finite": "ignore"}, "not_finite"),
        ({"deepspeed": {"fp16": {"enabled": True}}}, "decided by precision"),
        ({"keep_checkpoints": 1}, "keep_checkpoints"),
        ({"deepspeed": {"train_batch_size": 8}}, "decided by global_batch_size"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "decided by zero_stage"),
        ({"tokens_per_micro_batch": 90, "group_by_length": True}, "groups by length"),
        ({"learning_rat": 1}, "did you mean 'learning_rate'"),
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


def test_locations_mean_the_same_in_every_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert make_spec("runs/a").folder == str(tmp_path / "runs" / "a")
    assert make_spec("s3://bucket/a").folder == "s3://bucket/a"


def test_a_run_is_the_same_however_it_is_spread_and_another_with_another_rate() -> None:
    run = make_spec("here").reproducibility_key()
    spread = make_spec("there", zero_stage=3, micro_batch_size=4, checkpoint_every_steps=1)
    assert spread.reproducibility_key() == run
    assert make_spec("here", not_finite="skip", keep_every_hours=1).reproducibility_key() == run
    assert make_spec("here", freeze=["*.bias"]).reproducibility_key() != run
    assert make_spec("here", learning_rate=1e-5).reproducibility_key() != run
