"""Cards of extractors that nobody has run."""

import json
from typing import Any

from pipeline.data.read.extractor_card import ExtractorCard


def make_card(**changes: Any) -> ExtractorCard:
    """A card of grid features of eight values a cell, but for the changes."""
    document = {
        "type": "grid",
        "identity": "0" * 32,
        "config": {"type": "grid"},
        "weights": None,
        "dim": 8,
        "grid": None,
        "boxes": "grid",
    }
    return ExtractorCard.parse(document | changes, "card")


def card_bytes(**changes: Any) -> bytes:
    """The same as a file has it."""
    return json.dumps(make_card(**changes).plain()).encode()
