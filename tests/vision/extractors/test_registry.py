"""An extractor that is built again from the card of its features."""

import pytest

from pipeline.data.read.extractor_card import Weights
from pipeline.errors import FeatureError
from pipeline.vision.extractors.pixels import PixelsConfig
from pipeline.vision.extractors.registry import from_card

CARD = PixelsConfig(image_size=6, patch_size=3).build().card()


def test_a_card_gives_the_extractor_that_wrote_it() -> None:
    assert from_card(CARD).card() == CARD


def test_features_of_another_release_are_told_from_replaced_weights() -> None:
    earlier = CARD.model_copy(update={"identity": "0" * 32, "preprocessing": ({"step": "decode"},)})
    with pytest.raises(FeatureError, match="this release prepares pictures otherwise; use the"):
        from_card(earlier)
    replaced = CARD.model_copy(update={"identity": "0" * 32, "weights": Weights(digest="0")})
    with pytest.raises(FeatureError, match=r"were its weights .* replaced"):
        from_card(replaced)
