from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from pipeline.data.ingest.ingest import IngestConfig, ingest
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.sample import Texts
from pipeline.data.sources.base import (
    Record,
    Reject,
    accounted,
    by_key,
    fingerprint,
    in_validation,
    refused,
)
from pipeline.errors import SourceError
from pipeline.reason import Reason
from tests.data.world import Item, World


def test_fingerprints_tell_an_edited_image_from_edited_texts() -> None:
    def record(image: str, caption: str) -> Record:
        texts = Texts("a", (caption,)).encoded()
        return Record("a", "train", "a.jpg", "jpg", texts, fingerprint(image))

    before = record("photo 1", "a cat")
    edited_texts, edited_image = record("photo 1", "a dog"), record("photo 2", "a cat")
    assert edited_texts.image_fingerprint == before.image_fingerprint
    assert edited_texts.texts_fingerprint != before.texts_fingerprint
    assert edited_image.image_fingerprint != before.image_fingerprint
    assert edited_image.texts_fingerprint == before.texts_fingerprint


def test_what_is_refused_remains() -> None:
    record = Record("a", "train", "", "", Texts("a", ("a cat",)).encoded(), fingerprint("1"))
    reject = refused(record, Reason.MISSING_IMAGE, "gone")
    assert reject.remains == record
    assert reject.image_fingerprint == record.image_fingerprint
    assert reject.texts_fingerprint == record.texts_fingerprint


def test_locations_are_named_by_the_keys_that_give_them() -> None:
    images: dict[str, str | list[str]] = {"train": ["a", "b"], "test": "c"}
    assert by_key(images=images, dense=None, table="t") == {
        "images.train.0": "a",
        "images.train.1": "b",
        "images.test": "c",
        "table": "t",
    }


def test_a_split_by_hash_is_stable_and_grows_with_its_fraction() -> None:
    keys = [f"key-{n}" for n in range(2000)]
    tenth = {key for key in keys if in_validation(key, 0.1)}
    fifth = {key for key in keys if in_validation(key, 0.2)}
    assert 150 < len(tenth) < 250
    assert tenth < fifth
    assert not any(in_validation(key, 0.0) for key in keys)


class Counted(World):
    """A world whose index may say something else than it lists."""

    num_entries = 0

    def index(self) -> dict[str, int]:
        return {"rows.parquet": self.num_entries}


def test_a_listing_is_held_against_the_sources_own_index(tmp_path: Path) -> None:
    source = Counted({f"key-{n}": Item(n, "words") for n in range(4)})
    source.num_entries = 4
    config = IngestConfig(shards_in_flight=0)
    assert ingest(source, str(tmp_path), config).num_live == 4
    source.items["key-0"] = Item(9, "other words")
    for number in (3, 5):
        source.num_entries = number
        version = Manifest.open(str(tmp_path)).version
        with pytest.raises(SourceError, match=f"rows.parquet has {number}: of {number} .* 4 are"):
            ingest(source, str(tmp_path), config)
        assert Manifest.open(str(tmp_path)).version == version


def test_a_record_may_stand_for_several_entries() -> None:
    class Grouped(Counted):
        num_entries = 6

        def records(self) -> Iterator[Record | Reject]:
            for entry in super().records():
                yield replace(entry, num_entries=3)

    items = {"a": Item(1, "words"), "b": Item(2, "words", fault="missing-image")}
    assert len(list(accounted(Grouped(items)))) == 2
