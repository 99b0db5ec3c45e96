"""The extractors by name, from a recipe's settings or a card found beside features."""

from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.data.read.extractor_card import ExtractorCard
from pipeline.errors import FeatureError
from pipeline.vision.extractor import Extractor
from pipeline.vision.extractors.detection.regions import RegionsConfig
from pipeline.vision.extractors.detection.segments import SegmentsConfig
from pipeline.vision.extractors.grid import GridConfig
from pipeline.vision.extractors.imported import ImportedConfig
from pipeline.vision.extractors.patches import PatchesConfig
from pipeline.vision.extractors.pixels import PixelsConfig

AnyExtractor = Annotated[
    PixelsConfig | GridConfig | RegionsConfig | SegmentsConfig | PatchesConfig | ImportedConfig,
    Field(discriminator="type"),
]
_EXTRACTOR: TypeAdapter[Any] = TypeAdapter(AnyExtractor)


def settings_of(card: ExtractorCard) -> AnyExtractor:
    """Returns the settings on a card; FeatureError if no extractor has them."""
    try:
        settings: AnyExtractor = _EXTRACTOR.validate_python(card.config)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, ("config", *fault["loc"])))
        raise FeatureError(f"not the card of an extractor: {key}: {fault['msg']}") from error
    return settings


def from_card(card: ExtractorCard, device: str = "cpu") -> Extractor:
    """Builds the extractor that made some features, or raises FeatureError if it is gone.

    Its identity must come out as on the card: a weights file that was replaced since is refused.
    """
    extractor: Extractor = settings_of(card).build(device)
    now = extractor.card()
    if now.identity != card.identity:
        if now.weights == card.weights and now.preprocessing != card.preprocessing:
            reason = (
                "its weights are the same, but this release prepares pictures otherwise; use the "
                "release that made them, or make features anew and train on those"
            )
        else:
            reason = f"were its weights ({card.config.get('weights')}) replaced?"
        raise FeatureError(
            f"extractor {card.type}: its identity was {card.identity} when the features were "
            f"made and is {now.identity} now; {reason}"
        )
    return extractor
