"""Live features, made anew for each batch, none of them stored.

Either the model learns from the pixels themselves (`pixels`), or the extractor's network becomes
its backbone, which is trained with the rest of it (`grid`).
"""

from pipeline.data.media.augmentation import AugmentConfig
from pipeline.data.media.image_pixels import DECODING
from pipeline.data.read.extractor_card import ExtractorCard, LivePictures, Weights, identity
from pipeline.data.read.images import ImageConfig, LiveConfig
from pipeline.errors import FeatureError
from pipeline.vision.extractors.grid import NORMALIZE, GridConfig
from pipeline.vision.extractors.pixels import PixelsConfig
from pipeline.vision.extractors.registry import AnyExtractor, settings_of

# As `data.decoding` does, which extractors that store features do not ask for.
_REDUCED = {"step": "take a large JPEG at the half, quarter or eighth that has enough pixels"}
_REASONS = {
    "regions": "which boxes a detector keeps has no gradient",
    "segments": "which boxes a detector keeps has no gradient",
    "patches": "towers of transformers have preprocessing of their own and are not trained here",
    "imported": "they were computed elsewhere, and there is no network to run",
}


def refusal(extractor: AnyExtractor) -> str | None:
    """Says why an extractor's features cannot be made live; None if they can."""
    if isinstance(extractor, PixelsConfig):
        return None
    if not isinstance(extractor, GridConfig):
        return f"{_REASONS[extractor.type]}; live features are those of `pixels` and `grid`"
    if extractor.fit != "stretch":
        return "fit=crop: a picture is seen whole, or as `augment` varies it; use fit=stretch"
    stored = GridConfig()
    for key in ("storage", "pca", "frames", "window"):
        if getattr(extractor, key) != getattr(stored, key):
            return f"{key} is of features that are stored; leave it out"
    return None


def live_card(extractor: AnyExtractor, augment: AugmentConfig | None) -> ExtractorCard:
    """Returns what makes the features, as the extractor's own card says it of stored ones.

    Weights are those that training begins with. Raises FeatureError if they cannot be had.
    """
    assert isinstance(extractor, PixelsConfig | GridConfig), refusal(extractor)
    card = extractor.build("cpu").card()
    augmented = None if augment is None else augment.model_dump(mode="json")
    preprocessing = (
        DECODING,
        _REDUCED,
        *([] if augmented is None else [{"step": "in training, a random crop", **augmented}]),
        {"step": "resize, antialiased bilinear, in torch", "size": extractor.image_size},
        *([NORMALIZE] if isinstance(extractor, GridConfig) else []),
    )
    digest = None if card.weights is None else card.weights.digest
    stored = {"live": True}
    return card.model_copy(
        update={
            "identity": identity(card.type, digest, preprocessing, card.selection, stored),
            "live": LivePictures(augment=augment),
            "weights": None if digest is None else Weights(digest=digest, trained=True),
            "preprocessing": preprocessing,
            "storage": stored,
            "dtype": "uint8",
            "parts": {},
        }
    )


def live_config(card: ExtractorCard) -> LiveConfig | None:
    """Returns what a loader gives to the model of this card; None if features are stored."""
    if card.live is None:
        return None
    settings = settings_of(card)
    if card.grid is None or not isinstance(settings, PixelsConfig | GridConfig):
        raise FeatureError(f"{card.name}: live features are those of `pixels` and `grid`")
    images = ImageConfig(size=settings.image_size, augment=card.live.augment)
    return LiveConfig(images=images, grid=card.grid, patches=isinstance(settings, PixelsConfig))


def backbone_config(card: ExtractorCard | None) -> GridConfig | None:
    """Returns the network that a model of this card has in it, if there is one."""
    if card is None or card.live is None:
        return None
    settings = settings_of(card)
    return settings if isinstance(settings, GridConfig) else None
