"""Text states and the tokens they should give to one cross-entropy per sample."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pipeline.models.base import VisionLanguageModel
from pipeline.objectives.base import IGNORED


def mean_token_loss(model: VisionLanguageModel, states: Tensor, target: Tensor) -> Tensor:
    """Maps states (B, T, D) and target (B, T), IGNORED where there is none, to losses (B,).

    A sample's loss is the mean over its own targets, 0 if it has none. The usual mean over all
    targets of a batch would weigh a sample by the lengths of the ones beside it.
    """
    wanted = target != IGNORED
    logits = model.token_logits(states[wanted])
    losses = torch.zeros(target.shape, dtype=torch.float32, device=target.device)
    losses[wanted] = F.cross_entropy(logits.float(), target[wanted], reduction="none")
    return losses.sum(1) / wanted.sum(1).clamp(min=1)
