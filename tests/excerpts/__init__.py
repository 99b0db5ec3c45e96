"""Published annotations as they lie in the repository: see the README there."""

import gzip
import json
from pathlib import Path
from typing import Any

EXCERPTS = Path(__file__).resolve().parent


def read_excerpt(name: str) -> Any:
    """Returns what tests/excerpts/NAME.json.gz holds."""
    with gzip.open(EXCERPTS / f"{name}.json.gz") as file:
        return json.load(file)
