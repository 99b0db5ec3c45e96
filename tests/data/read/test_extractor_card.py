"""The card of an extractor: its form, now and before it had a version."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.read.extractor_card import (
    VERSION,
    ExtractorCard,
    PartLayout,
    identity,
    read_card,
    write_card,
)
from pipeline.errors import FeatureError
from tests.data.cards import make_card


def test_a_card_is_read_as_it_was_written(tmp_path: Path) -> None:
    card = make_card(
        grid=[2, 3],
        parts={"classes": {"dtype": "float16", "shape": ["R", 91]}},
        weights={"digest": "00", "random": True},
        live={"augment": None},
    )
    write_card(str(tmp_path), card)
    assert read_card(str(tmp_path), card.name) == card
    assert card.name == "grid-00000000"
    assert card.parts["classes"] == PartLayout.of("float16", "R", 91)
    assert read_card(str(tmp_path), "grid-11111111") is None


def test_plain_data_lacks_what_nobody_said_but_not_what_is_none() -> None:
    plain = make_card().plain()
    assert plain["grid"] is None
    assert plain["weights"] is None
    assert not plain.keys() & {"pca", "live", "class_names", "segments", "frame_grid"}


def test_what_others_noted_on_a_card_stays(tmp_path: Path) -> None:
    card = ExtractorCard.parse(make_card().plain() | {"note": "ours"}, "card")
    write_card(str(tmp_path), card)
    document = json.loads((tmp_path / "features" / card.name / "card.json").read_text())
    assert document["note"] == "ours"


def test_a_later_form_is_refused() -> None:
    later = make_card().plain() | {"version": VERSION + 1, "boxes": {"of": "another kind"}}
    with pytest.raises(FeatureError, match=r"^here: .*a later release wrote it, in form 2, and"):
        ExtractorCard.parse(later, "here")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dim": "many"}, "dim: "),
        ({"grid": [2]}, "grid.1: "),
        ({"boxes": "somewhere"}, "boxes: "),
        ({"parts": {"labels": {"dtype": "int32", "shape": ["Q"]}}}, "parts.labels.shape.0"),
    ],
)
def test_a_damaged_card_is_named_with_its_key(change: dict[str, Any], said: str) -> None:
    with pytest.raises(FeatureError, match=f"^card: not the card of an extractor: .*{said}"):
        ExtractorCard.parse(make_card().plain() | change, "card")
    with pytest.raises(FeatureError, match="not the card of an extractor"):
        ExtractorCard.parse("grid", "card")


def test_identity_changes_with_every_part() -> None:
    parts: dict[str, Any] = {
        "kind": "grid",
        "weights_digest": "00",
        "preprocessing": [{"step": "resize", "size": 4}],
        "selection": {"node": "layer4"},
        "storage": {"dtype": "float16"},
    }
    changes: list[dict[str, Any]] = [
        {},
        {"kind": "pixels"},
        {"weights_digest": "01"},
        {"weights_digest": None},
        {"preprocessing": [{"step": "resize", "size": 5}]},
        {"selection": {"node": "layer3"}},
        {"storage": {"dtype": "float32"}},
    ]
    found = [identity(**(parts | change)) for change in changes]
    assert len(set(found)) == len(changes)
    assert identity(**parts) == found[0]
