"""A model's parameters to AdamW's groups."""

from typing import Any

import torch
from torch import nn

from pipeline.training.spec import TrainingConfig


def build_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Returns AdamW over the trainable parameters (decoupled weight decay, arXiv:1711.05101)."""
    return torch.optim.AdamW(
        parameter_groups(module, config.weight_decay),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        # one kernel per group where the device has one; a loop over parameters elsewhere
        fused=next(module.parameters()).is_cuda,
    )


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Splits the trainable parameters: matrices decay; norms and biases, one-dimensional, do not.

    The order within a group is the module's own, so that equal models give equal groups.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
