"""DeepSpeed's configuration of a run."""

from collections.abc import Mapping
from typing import Any

from pipeline.errors import ConfigError
from pipeline.training.config import TrainingConfig
from pipeline.training.engine.async_io import is_swapped
from pipeline.training.engine.optimizer import state_kinds
from pipeline.training.spec import RankContext


def engine_config(
    config: TrainingConfig, rank_context: RankContext, num_parameters: int
) -> dict[str, Any]:
    """Returns DeepSpeed's configuration, or raises ConfigError for an impossible combination."""
    precision = config.resolved_precision(rank_context.device)
    # A bucket is allocated whole: DeepSpeed's 500 million elements would be 2 GB for any model.
    # It must be a multiple of an alignment that depends on the world size.
    bucket = min(500_000_000, -(-num_parameters // 4096) * 4096)
    own = {
        # Its third number, the samples of a step, would be their product, which ours need not be:
        # what a micro-batch counts for, and which is a step's last, is said by `advance`.
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps(rank_context.world_size),
        "gradient_clipping": 0.0 if config.zero_stage == 0 else config.optimizer.clip_norm,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            **_swapping(config),
        },
        # torch's AdamW also where the optimizer is offloaded: DeepSpeed's own is compiled at start
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
    }
    return merged(own, config.deepspeed)


def _swapping(config: TrainingConfig) -> dict[str, Any]:
    """Returns what DeepSpeed must be told to swap AdamW's state to files, if that is asked for."""
    zero = config.deepspeed.get("zero_optimization", {})
    if not is_swapped(zero):
        return {}
    # Of a group there are in memory at once weights, gradients and what AdamW keeps; and of its
    # neighbours too where they are read ahead or written behind.
    offload = zero["offload_optimizer"]
    groups = 1 + bool(offload.get("pipeline_read")) + bool(offload.get("pipeline_write"))
    buffers = groups * (2 + len(state_kinds(config.optimizer)))
    if offload.get("buffer_count", buffers) < buffers:
        raise ConfigError(
            "training.deepspeed.zero_optimization.offload_optimizer.buffer_count: this optimizer "
            f"needs {buffers}, found {offload['buffer_count']}; leave it out"
        )
    # With DeepSpeed's own size, a billion, most models are one group, in memory as a whole.
    return {"offload_optimizer": {"buffer_count": buffers}, "sub_group_size": 2**24}


def merged(own: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `own` with the keys of `more` put in, mapping by mapping."""
    result = dict(own)
    for key, value in more.items():
        below = result.get(key)
        both = isinstance(below, dict) and isinstance(value, Mapping)
        result[key] = merged(below, value) if both and below is not None else value
    return result
