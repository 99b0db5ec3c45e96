"""The memory of a rank, beside what a micro-batch leaves behind.

AdamW's state is fp32 whatever the precision: moments, and from ZeRO stage 1 on a master copy of
the weights. Stage 1 cuts these up over ranks, stage 2 gradients too, stage 3 also the weights.
The figures are those of DeepSpeed 0.19.8 at the fullest moment of a step, and tested against it;
buffers that it makes for a moment and the allocator's loss come on top.
"""

from dataclasses import dataclass

from pipeline.training.config import TrainingConfig
from pipeline.training.engine.async_io import is_swapped
from pipeline.training.engine.deepspeed_config import engine_config
from pipeline.training.spec import RankContext

FP32_BYTES = 4


@dataclass(frozen=True)
class StateBytes:
    """What one rank keeps where: on its device, in the host's memory, and in swap files."""

    device: int
    offloaded: int = 0
    swapped: int = 0


def state_bytes(
    config: TrainingConfig,
    rank_context: RankContext,
    num_parameters: int,
    num_trained: int,
) -> StateBytes:
    """Returns what weights, gradients and the optimizer take at `config.zero_stage`.

    Raises ConfigError for a stage and precision that do not go together.
    """
    world_size, stage = rank_context.world_size, config.zero_stage
    precision = config.resolved_precision(rank_context.device)
    zero = engine_config(config, rank_context, num_parameters)["zero_optimization"]
    size = FP32_BYTES if precision == "fp32" else 2  # of a weight, and of its gradient
    copies = 2 + (
        config.optimizer.ema_decay is not None
    )  # of fp32 numbers that the optimizer keeps
    gradients = size * num_trained
    bucket = size * min(zero["reduce_bucket_size"], num_trained)
    if stage == 0:
        return StateBytes(
            size * num_parameters + gradients + copies * FP32_BYTES * num_trained,
        )
    mine = -(-num_trained // world_size)
    optimizer = (copies + 1) * FP32_BYTES * mine
    updating = (size + FP32_BYTES) * mine  # gradients of its part, and the same in fp32
    weights = size * num_parameters
    if stage == 1:
        transient = max(gradients, updating)
    elif stage == 2:
        transient = max(size * mine + bucket, updating)
    else:
        weights = -(-weights // world_size)
        transient = bucket + updating
    offloaded = swapped = 0
    if _is_offloaded(zero.get("offload_optimizer")):
        offloaded += optimizer + FP32_BYTES * mine
        optimizer, transient = 0, transient - min(transient, FP32_BYTES * mine)
    if stage == 3 and is_swapped(zero):  # but for the group that is updated
        swapped = offloaded
        buffers = zero["offload_optimizer"]["buffer_count"]
        offloaded = buffers * FP32_BYTES * min(zero["sub_group_size"], mine)
    if stage == 3 and _is_offloaded(zero.get("offload_param")):
        offloaded += weights
        weights = 0
    return StateBytes(weights + optimizer + transient, offloaded, swapped)


def _is_offloaded(settings: dict[str, object] | None) -> bool:
    return bool(settings) and settings.get("device", "none") != "none"  # type: ignore[union-attr]
