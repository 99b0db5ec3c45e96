import json
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.training.config import TrainingConfig
from pipeline.training.engine.deepspeed_config import engine_config
from pipeline.training.spec import RankContext


def config_of(**settings: Any) -> dict[str, Any]:
    sizes = {"steps": 10, "global_batch_size": 24, "micro_batch_size": 2}
    config = TrainingConfig.model_validate({**sizes, **settings})
    return engine_config(config, RankContext(1, 3, 1, settings.pop("device", "cpu")), 1000)


def test_the_resolved_configuration_is_plain_and_whole() -> None:
    config = config_of(zero_stage=2, precision="bf16", optimizer={"clip_norm": 0.5})
    assert json.loads(json.dumps(config)) == config
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 4
    assert config["bf16"] == {"enabled": True}
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"]["reduce_bucket_size"] == 4096


def test_further_keys_are_merged_in() -> None:
    more = {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": False}
    config = config_of(zero_stage=3, deepspeed=more)
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["overlap_comm"] is True
    assert config["wall_clock_breakdown"] is False


def test_ranks_without_a_sample_are_refused() -> None:
    with pytest.raises(ConfigError, match="leaves some of 3 ranks without a sample"):
        config_of(global_batch_size=2)
