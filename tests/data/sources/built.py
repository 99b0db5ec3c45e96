"""What the tests of sources share: a source built from recipe settings, and what it lists."""

from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.config import Config, check
from pipeline.data.ingest.ingest import IngestConfig, IngestReport, ingest
from pipeline.data.sources import AnySource
from pipeline.data.sources.base import Record, Reject, Source, accounted


class DatasetPart(Config):
    source: AnySource


def build(type_name: str, **settings: Any) -> Source:
    """Returns a source as a recipe would build it, paths turned into text."""
    document = {"source": {"type": type_name, **settings}}
    return check(DatasetPart, document, "recipe").source.build()


def listed(source: Source) -> dict[str, Record | Reject]:
    return {entry.key: entry for entry in accounted(source)}


def reason(entry: Record | Reject) -> str:
    return entry.reason if isinstance(entry, Reject) else "live"


def reasons(source: Source) -> Counter[str]:
    return Counter(reason(entry) for entry in accounted(source))


def record(source: Source, key: str) -> Record:
    entry = listed(source)[key]
    assert isinstance(entry, Record), entry
    return entry


def fingerprints(entry: Record | Reject) -> tuple[str, str]:
    return entry.image_fingerprint, entry.texts_fingerprint


def ingested(source: Source, folder: Path) -> IngestReport:
    config = IngestConfig(shards_in_flight=0, max_reject_fraction=1.0, verify="header")
    return ingest(source, str(folder / "dataset"), config)


def draw(*paths: Path) -> None:
    """Writes small images, each of its own colour."""
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (7, 5), (number % 256, 40, 90)).save(path)
