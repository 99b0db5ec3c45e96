"""Image-text contrast: each caption's picture among all of the step, and each picture's caption."""

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pipeline.config import Config
from pipeline.data.load.loader import Batch
from pipeline.errors import ModelError
from pipeline.models.base import VisionLanguageModel
from pipeline.models.inputs import Encoded, Inputs
from pipeline.models.late_fusion import LateFusion
from pipeline.objectives.base import Encodings, Objective, Stream, Vocabulary
from pipeline.objectives.gather import first_of_own, gathered


class ItcConfig(Config):
    """The weight of the mean of both directions."""

    weight: float = Field(
        default=1.0, gt=0, description="factor of its loss in the sum of the objectives'"
    )

    def build(self) -> "list[ImageTextContrast]":
        return [ImageTextContrast(self)]


class ImageTextContrast(Objective):
    """CLIP's loss (arXiv:2103.00020, 2.3) for a dual encoder, in a pass of its own.

    The one objective whose per-sample loss depends on its batch, by its nature: the negatives are
    the rest of the global batch. They are gathered over ranks, so that the same global batch gives
    the same losses on any number of them; micro-batches after one another could not see each
    other, and are refused. An evaluation cuts what is held out into global batches as equal as
    they can be. Unlike CLIP's, pairs with another caption of the same image are left
    out of the negatives.
    """

    name = "itc"
    stream = Stream("captions", "full", is_intact=True)
    metric_name = "recall@1"
    needs_global_batch = True

    def __init__(self, config: ItcConfig) -> None:
        super().__init__(config.weight)

    def refusal(self, family: type[VisionLanguageModel]) -> str | None:
        if not issubclass(family, LateFusion):
            return f"{family.__name__} has no vectors to compare; it is for late_fusion"
        return super().refusal(family)

    def attach(self, model: VisionLanguageModel) -> nn.Module | None:
        _dual(model)
        return None

    def prepare(
        self,
        batch: Batch,
        encodings: Encodings,
        vocabulary: Vocabulary,  # noqa: ARG002
        drawn: None,  # noqa: ARG002
    ) -> tuple[Encodings, Tensor]:
        """The target (B,) is the row of the image."""
        return encodings, torch.from_numpy(batch.rows)

    def loss(
        self, model: VisionLanguageModel, encoded: Encoded, inputs: Inputs, target: Tensor
    ) -> Tensor:
        to_images, to_texts, own = self._logits(model, encoded, inputs, target)
        return (
            F.cross_entropy(to_images, own, reduction="none")
            + F.cross_entropy(to_texts, own, reduction="none")
        ) / 2

    def metric(
        self, model: VisionLanguageModel, encoded: Encoded, inputs: Inputs, target: Tensor
    ) -> Tensor:
        """Both directions' recall, averaged, among the global batch."""
        to_images, to_texts, own = self._logits(model, encoded, inputs, target)
        found = (to_images.argmax(1) == own).float() + (to_texts.argmax(1) == own).float()
        return found / 2

    def _logits(
        self, model: VisionLanguageModel, encoded: Encoded, inputs: Inputs, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns each local text's logits over all images and vice versa, (B, G) of the G samples
        of the global batch, and the column (B,) of the sample itself."""
        dual = _dual(model)
        texts, images = (side.float() for side in dual.contrastive(encoded, inputs))
        all_texts, all_images = gathered(torch.cat([texts, images], dim=1)).chunk(2, dim=1)
        own = first_of_own(target) + torch.arange(len(target), device=target.device)
        same_image = target[:, None] == gathered(target)
        same_image[torch.arange(len(target), device=target.device), own] = False
        to_images = dual.temperature(texts @ all_images.T).masked_fill(same_image, -torch.inf)
        to_texts = dual.temperature(images @ all_texts.T).masked_fill(same_image, -torch.inf)
        return to_images, to_texts, own


def _dual(model: VisionLanguageModel) -> LateFusion:
    if not isinstance(model, LateFusion):
        raise ModelError(
            f"objectives.itc: {type(model).__name__} has no vectors to compare; it is for "
            "model.family=late_fusion"
        )
    return model
