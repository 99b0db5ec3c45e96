"""Live features, made anew for each batch, none of them stored.

Either the model learns from the pixels themselves (`pixels`), or the extractor's network becomes
its backbone, which is trained with the rest of it (`grid`).
"""

from collections.abc import Mapping
from typing import Any

from pipeline.data.media.augmentation import AugmentConfig
from pipeline.data.media.image_pixels import DECODING
from pipeline.data.read.images import ImageConfig, LiveConfig
from pipeline.vision.extractors.extractor import AnyExtractor
from pipeline.vision.extractors.grid import NORMALIZE, GridConfig
from pipeline.vision.extractors.pixels import PixelsConfig
from pipeline.vision.feature import identity

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


def live_card(extractor: AnyExtractor, augment: AugmentConfig | None) -> dict[str, Any]:
    """Returns what makes the features, as the extractor's own card says it of stored ones.

    Weights are those that training begins with. Raises FeatureError if they cannot be had.
    """
    assert isinstance(extractor, PixelsConfig | GridConfig), refusal(extractor)
    card = extractor.build("cpu").card()
    augmented = None if augment is None else augment.model_dump(mode="json")
    preprocessing = [
        DECODING,
        _REDUCED,
        *([] if augmented is None else [{"step": "in training, a random crop", **augmented}]),
        {"step": "resize, antialiased bilinear, in torch", "size": extractor.image_size},
        *([NORMALIZE] if isinstance(extractor, GridConfig) else []),
    ]
    weights = card["weights"]
    digest = None if weights is None else weights["digest"]
    stored = {"live": True}
    return card | {
        "identity": identity(card["type"], digest, preprocessing, card["selection"], stored),
        "live": {"augment": augmented},
        "weights": None if weights is None else {"digest": digest, "trained": True},
        "preprocessing": preprocessing,
        "storage": stored,
        "dtype": "uint8",
        "parts": {},
    }


def live_config(card: Mapping[str, Any]) -> LiveConfig | None:
    """Returns what a loader gives to the model of this card; None if features are stored."""
    if "live" not in card:
        return None
    augment = card["live"]["augment"]
    images = ImageConfig(
        size=card["config"]["image_size"],
        augment=None if augment is None else AugmentConfig.model_validate(augment),
    )
    rows, columns = card["grid"]
    return LiveConfig(images=images, grid=(rows, columns), patches=card["type"] == "pixels")


def backbone_config(card: Mapping[str, Any]) -> GridConfig | None:
    """Returns the network that a model of this card has in it, if there is one."""
    if "live" not in card or card["type"] != "grid":
        return None
    return GridConfig.model_validate(card["config"])
