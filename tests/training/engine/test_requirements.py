import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.training.engine.engine import Engine
from pipeline.training.engine.requirements import require_known_keys, require_precision
from pipeline.training.spec import RankContext
from tests.training.engine.test_engine import advance
from tests.training.stand_in import make_spec, stand_in

HERE = RankContext(rank=0, world_size=1, local_rank=0, device="cpu")


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("can", [False, True])
def test_fp16_is_refused_where_a_cpu_cannot_compute_in_halves_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can: bool
) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: can)
    deepspeed = {"fp16": {"initial_scale_power": 4}}
    spec = make_spec(tmp_path, precision="fp16", deepspeed=deepspeed)
    if can:
        require_precision(spec.training, HERE, "training.pretrain.precision")
        engine = Engine(stand_in(spec).module, spec.training, HERE)
        found = advance(engine, spec, 0, 2)
        engine.close()
        assert all(math.isfinite(norm) for _, norm in found)
        assert engine.skipped == 0
        return
    with pytest.raises(ConfigError, match=r"pretrain.precision: fp16 needs a GPU.*use bf16"):
        require_precision(spec.training, HERE, "training.pretrain.precision")
    with pytest.raises(ConfigError, match=r"training.precision: fp16 needs a GPU.*use bf16"):
        Engine(stand_in(spec).module, spec.training, HERE)
    on_a_gpu = replace(HERE, device="cuda:0")
    require_precision(spec.training, on_a_gpu, "training.pretrain.precision")


@pytest.mark.usefixtures("alone")
def test_swapping_at_a_stage_that_does_not_is_refused(tmp_path: Path) -> None:
    zero = {"offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}}
    spec = make_spec(tmp_path, zero_stage=2, deepspeed={"zero_optimization": zero})
    with pytest.raises(ConfigError, match=r"nvme needs zero_stage=3, found 2.* use device: cpu"):
        Engine(stand_in(spec).module, spec.training, HERE)


@pytest.mark.parametrize(
    ("deepspeed", "refusal"),
    [
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            r"x\.zero_optimization\.offload_optimizer\.devise: .* mean 'device'",
        ),
        (
            {"zero_optimization": {"overlap_com": True}},
            r"x\.zero.*\.overlap_com: .*'overlap_comm'",
        ),
        ({"zero_optimisation": {}}, r"x\.zero_optimisation: unknown key; .* 'zero_optimization'"),
        (
            {"wall_clock": True, "dump_stat": True},
            r"dump_stat: .*'dump_state'.*\n.*x\.wall_clock: ",
        ),
        (
            {"activation_checkpointing": {"partition": True, "profile": True}},
            r"x\.activation_checkpointing\.partition: unknown key; .*'partition_activations'",
        ),
        ({"aio": {"block_siz": 3}}, r"x\.aio\.block_siz: unknown key; .*'block_size'"),
        ({"aio": 3}, "x: DeepSpeed refuses these settings"),
        (
            {"zero_optimization": {"reduce_bucket_size": "large"}},
            r"x\.zero_optimization\.reduce_bucket_size: found 'large'; .*integer",
        ),
    ],
)
def test_a_key_that_deepspeed_does_not_know_is_refused_with_the_near_ones(
    deepspeed: dict[str, Any], refusal: str
) -> None:
    spec = make_spec("run", deepspeed=deepspeed)
    with pytest.raises(ConfigError, match=refusal):
        require_known_keys(spec.training, HERE, "x")


def test_keys_that_deepspeed_knows_are_let_through() -> None:
    known: dict[str, Any] = {
        "activation_checkpointing": {"partition_activations": True},
        "aio": {"block_size": 1048576, "queue_depth": 8},
        "checkpoint": {"tag_validation": "Warn"},
        "comms_logger": {"enabled": False},
        "communication_data_type": "fp32",
        "flops_profiler": {"enabled": True, "profile_step": 1},
        "steps_per_print": 10,
        "tensorboard": {"enabled": False},
        "timers": {"throughput": {"enabled": True}},
        "wall_clock_breakdown": True,
        "zero_optimization": {
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
            "overlap_comm": False,
            "stage3_prefetch_bucket_size": 1,
            "stage3_max_live_parameters": 5,
        },
    }
    spec = make_spec("run", zero_stage=3, deepspeed=known)
    require_known_keys(spec.training, HERE, "x")
