"""Text states and the tokens they should give to one figure per sample."""

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pipeline.models.base import VisionLanguageModel
from pipeline.objectives.base import IGNORED
from pipeline.objectives.per_sample import mean_of_places, nan_where_none


def mean_token_loss(model: VisionLanguageModel, states: Tensor, target: Tensor) -> Tensor:
    """Maps states (B, T, D) and target (B, T), IGNORED where there is none, to losses (B,).

    A sample's loss is the mean cross-entropy over its own targets, 0 if it has none.
    """
    wanted = target != IGNORED
    logits = model.token_logits(states[wanted])
    losses = F.cross_entropy(logits.float(), target[wanted], reduction="none")
    return mean_of_places(losses, wanted)


def token_accuracy(model: VisionLanguageModel, states: Tensor, target: Tensor) -> Tensor:
    """Maps the same to the share of a sample's targets that score highest (B,), NaN if none."""
    wanted = target != IGNORED
    right = model.token_logits(states[wanted]).argmax(-1) == target[wanted]
    return nan_where_none(mean_of_places(right, wanted), wanted)
