"""Cards that lie beside features since before they had a version: identities must not change.

`cards_without_version.json` holds what each kind of extractor wrote then.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.media.augmentation import AugmentConfig
from pipeline.data.read.extractor_card import ExtractorCard, identity
from pipeline.vision.extractors.live import backbone_config, live_card, live_config
from pipeline.vision.extractors.registry import settings_of

CARDS: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("cards_without_version.json").read_text()
)
WRAPPED = ("grid-frames", "patches-pca")  # identities of identities


@pytest.mark.parametrize("kind", CARDS)
def test_a_card_without_a_version_is_read_and_keeps_what_it_says(kind: str) -> None:
    before = CARDS[kind]
    card = ExtractorCard.parse(before, kind)
    after = card.plain()
    assert (card.version, after.pop("version")) == (1, 1)
    assert {name: after.get(name) for name in before} | {"weights": None} == before | {
        "weights": None
    }
    assert (card.weights is None) == (before["weights"] is None)
    if card.weights is not None:
        assert (after["weights"] | before["weights"]) == after["weights"]
    assert settings_of(card).type == card.type


@pytest.mark.parametrize("kind", [kind for kind in CARDS if kind not in ("imported", *WRAPPED)])
def test_an_identity_follows_from_the_card(kind: str) -> None:
    card = ExtractorCard.parse(CARDS[kind], kind)
    digest = None if card.weights is None else card.weights.digest
    found = identity(card.type, digest, card.preprocessing, card.selection, card.storage)
    assert found == card.identity


@pytest.mark.parametrize("kind", ["pixels", "grid", "regions", "grid-frames", "imported"])
def test_an_extractor_says_of_itself_what_it_said_then(kind: str) -> None:
    then = ExtractorCard.parse(CARDS[kind], kind)
    if kind == "grid-frames":
        pytest.importorskip("av")
    now = settings_of(then).build().card()
    rule = ("type", "config", "preprocessing", "selection", "storage", "dtype", "dim")
    for name in (*rule, "num_regions", "grid", "frame_grid", "boxes", "parts"):
        assert getattr(now, name) == getattr(then, name), name
    if now.weights == then.weights:  # random ones, which another processor may round otherwise
        assert now.identity == then.identity


@pytest.mark.parametrize("kind", ["live-pixels", "live-grid"])
def test_live_features_are_those_that_they_were(kind: str) -> None:
    then = ExtractorCard.parse(CARDS[kind], kind)
    augment = AugmentConfig() if kind == "live-grid" else None
    now = live_card(settings_of(then), augment)
    assert (now.preprocessing, now.storage) == (then.preprocessing, then.storage)
    assert live_config(now) == live_config(then)
    assert backbone_config(now) == backbone_config(then)
    assert (now.identity == then.identity) or now.weights != then.weights
