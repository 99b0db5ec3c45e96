"""A source that tests can edit at will, and the check of promise 1 against it."""

import io
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from random import Random

import xxhash
from PIL import Image

from pipeline import storage
from pipeline.data.ingest.ingest import IngestConfig, ingest
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.sample import Texts
from pipeline.data.sources.base import Record, Reject, fingerprint, refused
from pipeline.data.tars.shard import shard_location
from pipeline.errors import SourceError
from pipeline.reason import Reason

WIDTH, HEIGHT = 7, 5


class Killed(BaseException):
    """Ends a run where it stands, as a signal would."""


@dataclass(frozen=True)
class Item:
    """One record of the world. `fault` is what is wrong with its image, if anything."""

    picture: int
    caption: str
    split: str = "train"
    fault: str = ""
    touched: int = 0  # as a modification time: changes the fingerprint, not the bytes

    def image(self) -> bytes:
        if self.fault == "not-an-image":
            return b"<html>404</html>"
        colour = Random(self.picture).randbytes(3)
        file = io.BytesIO()
        Image.new("RGB", (WIDTH, HEIGHT), tuple(colour)).save(file, "JPEG")
        payload = file.getvalue()
        return payload[:-30] if self.fault == "truncated-image" else payload


@dataclass
class World:
    """The items by key; reading counts, and may be slow or fail at a chosen read."""

    items: dict[str, Item]
    reads: list[str] = field(default_factory=list)
    fail_at_read: int = -1
    seconds_per_read: float = 0.0

    def records(self) -> Iterator[Record | Reject]:
        for key, item in self.items.items():
            texts = Texts(key, captions=(item.caption,)).encoded()
            stamp = fingerprint(f"{item.picture} {item.fault} {item.touched}")
            record = Record(key, item.split, key, "jpg", texts, stamp)
            if item.fault == "missing-image":
                yield refused(record, Reason.MISSING_IMAGE, f"{key}: gone")
            else:
                yield record

    def read(self, record: Record) -> bytes:
        if len(self.reads) == self.fail_at_read:
            raise Killed("as if killed here")
        self.reads.append(record.key)
        time.sleep(self.seconds_per_read)
        item = self.items[record.image]
        if item.fault == "unreadable-image":
            raise SourceError(f"{record.image}: vanished")
        return item.image()


FAULTS = ("not-an-image", "truncated-image", "missing-image", "unreadable-image")


def make_world(num_items: int, seed: int = 0) -> World:
    random = Random(seed)
    return World({f"key-{n}": _item(random, f"caption {n}") for n in range(num_items)})


def disturb(world: World, random: Random) -> None:
    """Changes the world by one random edit."""
    keys = list(world.items)
    key = random.choice(keys)
    item = world.items[key]
    match random.randrange(7):
        case 0:
            world.items[f"key-{random.randrange(10**9)}"] = _item(random, "a new one")
        case 1 if len(keys) > 5:
            del world.items[key]
        case 2:
            world.items[key] = replace(item, caption=f"{item.caption}!")
        case 3:
            world.items[key] = replace(item, picture=random.randrange(10**9))
        case 4:
            world.items[key] = replace(item, touched=item.touched + 1)
        case 5:
            world.items[key] = replace(item, fault="" if item.fault else random.choice(FAULTS))
        case _:
            split = "validation" if item.split == "train" else "train"
            world.items[key] = replace(item, split=split)


def check_dataset(url: str, world: World, complete: bool = True) -> None:
    """Asserts promise 1: each listed record is one live sample, whole and right, or one reject.

    An incomplete dataset may lack records, and hold some as they were before.
    """
    manifest = Manifest.open(url)
    rows = {row["key"]: row for row in manifest.rows().to_pylist()}
    assert len(rows) == manifest.rows(["key"]).num_rows
    shards: dict[str, bytes] = {}
    for key, row in rows.items():
        item = world.items.get(key)
        if complete:
            expected = "removed" if item is None else "reject" if item.fault else "live"
            assert row["state"] == expected, (key, item, row)
        if row["state"] == "reject" and complete:
            assert item is not None
            assert row["reason"] == item.fault
            assert row["detail"]
        if row["state"] != "live":
            continue
        members = {}
        for part, shard in (("image", row["shard"]), ("texts", row["texts_shard"])):
            location = shard_location(url, row["split"], shard)
            if location not in shards:
                shards[location] = storage.read_bytes(location)
                assert xxhash.xxh3_128_hexdigest(shards[location])[:16] == shard
                with tarfile.open(fileobj=io.BytesIO(shards[location])) as tar:
                    assert tar.getnames()
            start = row[f"{part}_offset"]
            members[part] = shards[location][start : start + row[f"{part}_size"]]
        assert xxhash.xxh3_128_hexdigest(members["image"]) == row["digest"]
        texts = Texts.from_json(members["texts"])
        assert texts.image_id == key
        if complete:
            assert item is not None
            assert members["image"] == item.image()
            assert texts.captions == (item.caption,)
            assert (row["split"], row["width"], row["height"]) == (item.split, WIDTH, HEIGHT)
            assert row["num_captions"] == 1
    if complete:
        assert {key for key, row in rows.items() if row["state"] != "removed"} == set(world.items)


def _item(random: Random, caption: str) -> Item:
    fault = random.choice(FAULTS) if random.random() < 0.15 else ""
    split = "validation" if random.random() < 0.2 else "train"
    return Item(random.randrange(10**9), caption, split, fault)


def main() -> None:
    """Ingests a world slowly in a process that a test can kill: URL, items, seed."""
    url, num_items, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    world = make_world(num_items, seed)
    world.seconds_per_read = 0.002
    config = IngestConfig(samples_per_shard=3, max_reject_fraction=0.9, shards_in_flight=0)
    print("ready", flush=True)
    ingest(world, url, config)
    print("done", flush=True)


if __name__ == "__main__":
    main()
