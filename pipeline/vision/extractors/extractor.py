"""The extractors by name, from a recipe's settings or a card found beside features."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from pipeline.errors import FeatureError
from pipeline.vision.extractors.detection.regions import RegionsConfig
from pipeline.vision.extractors.detection.segments import SegmentsConfig
from pipeline.vision.extractors.grid import GridConfig
from pipeline.vision.extractors.imported import ImportedConfig
from pipeline.vision.extractors.patches import PatchesConfig
from pipeline.vision.extractors.pixels import PixelsConfig
from pipeline.vision.feature import Extractor, Feature
from pipeline.vision.preprocess.image import Prepared

__all__ = ["AnyExtractor", "Extractor", "Feature", "Prepared", "from_card"]

AnyExtractor = Annotated[
    PixelsConfig | GridConfig | RegionsConfig | SegmentsConfig | PatchesConfig | ImportedConfig,
    Field(discriminator="type"),
]
_EXTRACTOR: TypeAdapter[Any] = TypeAdapter(AnyExtractor)


def from_card(card: Mapping[str, Any], device: str = "cpu") -> Extractor:
    """Builds the extractor that made some features, or raises FeatureError if it is gone.

    Its identity must come out as on the card: a weights file that was replaced since is refused.
    """
    extractor: Extractor = _EXTRACTOR.validate_python(card["config"]).build(device)
    now = extractor.card()
    if now["identity"] != card["identity"]:
        same_weights = now["weights"] == card.get("weights")
        if same_weights and now["preprocessing"] != card.get("preprocessing"):
            reason = (
                "its weights are the same, but this release prepares pictures otherwise; use the "
                "release that made them, or make features anew and train on those"
            )
        else:
            reason = f"were its weights ({card['config'].get('weights')}) replaced?"
        raise FeatureError(
            f"extractor {card['type']}: its identity was {card['identity']} when the features were "
            f"made and is {now['identity']} now; {reason}"
        )
    return extractor
