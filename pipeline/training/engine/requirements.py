"""Requirements of a training config: what this machine, and its DeepSpeed, must be able to do.

DeepSpeed is imported only if one of them is in doubt.
"""

from typing import Any

from pydantic import ValidationError

from pipeline.errors import ConfigError
from pipeline.training.config import TrainingConfig
from pipeline.training.engine import async_io
from pipeline.training.engine.deepspeed_0_19 import async_io_builder, import_deepspeed
from pipeline.training.engine.deepspeed_config import engine_config
from pipeline.training.engine.known_keys import AskedFor, invalid
from pipeline.training.spec import RankContext


def require_precision(config: TrainingConfig, rank_context: RankContext, key: str) -> None:
    """Raises ConfigError, naming `key`, if this machine cannot compute in the config's precision.

    DeepSpeed is imported only if that is in doubt.
    """
    if config.precision == "fp16" and not rank_context.device.startswith("cuda"):
        import_deepspeed(rank_context.device)
        require_halves(key)


def require_halves(key: str) -> None:
    """Refuses at once what would fail later, and less clearly."""
    from deepspeed.accelerator import get_accelerator

    # Of CPUs those can that have instructions for it (AVX512-FP16, AMX-FP16).
    if not get_accelerator().is_fp16_supported():
        raise ConfigError(f"{key}: fp16 needs a GPU, or a CPU that computes in halves; use bf16")


def require_swapping(config: TrainingConfig, rank_context: RankContext) -> None:
    """Raises ConfigError if optimizer state is to be in files and cannot be on this machine.

    DeepSpeed is imported only if it is to be, and nothing is compiled yet.
    """

    def builder() -> Any:
        import_deepspeed(rank_context.device)
        return async_io_builder()

    zero = engine_config(config, rank_context, num_parameters=1)["zero_optimization"]
    async_io.require_ability(zero, builder)


def require_known_keys(config: TrainingConfig, rank_context: RankContext, key: str) -> None:
    """Raises ConfigError if `config.deepspeed`, which `key` names, is not what DeepSpeed reads."""
    if not config.deepspeed:
        return
    import_deepspeed(rank_context.device)
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    settings = AskedFor(engine_config(config, rank_context, num_parameters=1))
    try:
        DeepSpeedConfig(settings)
    except ValidationError as error:
        faults = invalid(error, config.deepspeed, DeepSpeedConfigModel)
    except (DeepSpeedConfigError, AssertionError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{key}: DeepSpeed refuses these settings: {error}") from error
    else:
        faults = settings.not_asked_for()
    if faults:
        raise ConfigError("\n".join(f"{key}.{fault}" for fault in faults))
