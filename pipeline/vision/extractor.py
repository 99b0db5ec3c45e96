"""The extractors by name, from a recipe's settings or a card found beside features."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from pipeline.errors import FeatureError
from pipeline.vision.feature import Extractor, Feature
from pipeline.vision.grid import GridConfig
from pipeline.vision.image import Prepared
from pipeline.vision.imported import ImportedConfig
from pipeline.vision.patches import PatchesConfig
from pipeline.vision.pixels import PixelsConfig
from pipeline.vision.regions import RegionsConfig
from pipeline.vision.segments import SegmentsConfig

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
    found = extractor.card()["identity"]
    if found != card["identity"]:
        raise FeatureError(
            f"extractor {card['type']}: its identity was {card['identity']} when the features were "
            f"made and is {found} now; were its weights ({card['config'].get('weights')}) replaced?"
        )
    return extractor
