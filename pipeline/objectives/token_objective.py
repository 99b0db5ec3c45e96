"""The base of objectives that predict tokens."""

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pipeline.models.base import VisionLanguageModel
from pipeline.models.inputs import Encoded, Inputs
from pipeline.objectives.base import IGNORED, Objective
from pipeline.objectives.per_sample import mean_per_sample, nan_where_none


class TokenObjective(Objective):
    """An objective whose target (B, T) is the token to predict at each position, or IGNORED."""

    metric_name = "accuracy"

    def select(self, target: Tensor, samples: Tensor, num_tokens: int) -> Tensor:
        return target[:, :num_tokens][samples]

    def loss(
        self,
        model: VisionLanguageModel,
        encoded: Encoded,
        inputs: Inputs,  # noqa: ARG002
        target: Tensor,
    ) -> Tensor:
        """A sample's loss is the mean cross-entropy over its own targets, 0 if it has none."""
        wanted = target != IGNORED
        logits = model.token_logits(encoded.text[wanted])
        losses = F.cross_entropy(logits.float(), target[wanted], reduction="none")
        return mean_per_sample(losses, wanted)

    def metric(
        self,
        model: VisionLanguageModel,
        encoded: Encoded,
        inputs: Inputs,  # noqa: ARG002
        target: Tensor,
    ) -> Tensor:
        """The share of a sample's targets that score highest, NaN if it has none."""
        wanted = target != IGNORED
        right = model.token_logits(encoded.text[wanted]).argmax(-1) == target[wanted]
        return nan_where_none(mean_per_sample(right, wanted), wanted)
