"""A model with the network in it that sees for it, fed with pixels in place of regions."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from pipeline.models.base import MaskKind, VisionLanguageModel
from pipeline.models.inputs import Cache, Encoded, Inputs

BACKBONE = "backbone"  # the module's name, before that of each of its parameters


class LiveModel(VisionLanguageModel):
    """Stands before a family in the order of its classes, and gives it features for pixels.

    `backbone` maps what the loader gives of B pictures, (B, R, P) uint8, to features (B, R, F). All
    else is the family's: its parameters have the same names, and its layouts know them.
    """

    backbone: nn.Module

    def encode(
        self, inputs: Inputs, *, mask: MaskKind = "full", attention: bool = False
    ) -> Encoded:
        return super().encode(  # type: ignore[safe-super]  # the family's
            self._seen(inputs), mask=mask, attention=attention
        )

    def start(self, inputs: Inputs) -> tuple[Tensor, Cache]:
        """Reads image and prefix tokens, as the family does if it writes text."""
        started: tuple[Tensor, Cache] = super().start(  # type: ignore[misc]  # the family's
            self._seen(inputs)
        )
        return started

    def _seen(self, inputs: Inputs) -> Inputs:
        return replace(inputs, features=self.backbone(inputs.features))


def live(family: type[Any]) -> type[Any]:
    """Returns the class of a family's models that see through a backbone."""
    return type(f"Live{family.__name__}", (LiveModel, family), {})
