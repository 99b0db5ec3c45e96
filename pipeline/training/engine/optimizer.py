"""AdamW's parameter groups."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.training.config import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")  # the names of what AdamW keeps of each parameter
EMA_WEIGHTS = "average"  # the name of the weights' moving average in AdamW's state


def state_kinds(config: OptimizerConfig) -> tuple[str, ...]:
    """Returns the names of what the optimizer keeps of each parameter."""
    return (*MOMENTS, EMA_WEIGHTS) if config.ema_decay is not None else MOMENTS


def freeze(module: nn.Module, patterns: Sequence[str]) -> None:
    """Takes the parameters whose names match out of training.

    Raises ConfigError for a pattern that matches none, and if nothing is left to train.
    """
    for pattern in patterns:
        for name in _matching(module, pattern, "freeze"):
            module.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigError(
            f"training.optimizer.freeze: {list(patterns)} leave no parameter to train"
        )


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Returns AdamW over the trainable parameters (decoupled weight decay, arXiv:1711.05101).

    With `ema_decay`, each update is followed by that of the weights' moving average, kept beside
    AdamW's moments (Polyak averaging, as in arXiv:1509.02971; it starts at the first weights).
    """
    optimizer = torch.optim.AdamW(
        parameter_groups(module, config),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        fused=True,  # one pass over the memory, on a CPU too
    )
    if config.ema_decay is not None:
        optimizer.register_step_post_hook(_averaging(config.ema_decay))
    return optimizer


def parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Splits the trainable parameters by learning rate and by weight decay.

    Matrices decay; norms and biases, one-dimensional, do not. `factor` is what a group's rate is
    multiplied with. Groups come as their first parameters do in the module, and the order within
    a group is the module's own, so that equal models give equal groups.
    """
    factors = {
        name: factor
        for pattern, factor in config.learning_rate_factors.items()
        for name in _matching(module, pattern, "learning_rate_factors")
    }
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        factor, decays = factors.get(name, 1.0), parameter.ndim >= 2
        group = groups.setdefault(
            (factor, decays),
            {
                "params": [],
                "weight_decay": config.weight_decay if decays else 0.0,
                "factor": factor,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def _averaging(decay: float) -> Callable[..., None]:
    def average(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # ZeRO shows the optimizer one group at a time, whose parameters are this rank's parts
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:  # else the update was not made
                    optimizer.state[parameter][EMA_WEIGHTS].lerp_(parameter, 1 - decay)

    return average


def _matching(module: nn.Module, pattern: str, key: str) -> list[str]:
    names = [name for name, _ in module.named_parameters()]
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        some = ", ".join(islice(names, 0, None, max(1, len(names) // 4)))
        raise ConfigError(
            f"training.optimizer.{key}: {pattern!r} matches no parameter; there are {some}, "
            "and so on"
        )
    return found
