"""Published annotations with official scores, as they lie in the repository."""

import gzip
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "excerpts"


def read_excerpt(name: str) -> Any:
    """Returns what tests/excerpts/NAME.json.gz holds; see the README there."""
    with gzip.open(FOLDER / f"{name}.json.gz") as file:
        return json.load(file)
