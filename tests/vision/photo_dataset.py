"""Datasets of small real images, made by the project's own ingest."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import xxhash
from PIL import Image

from pipeline.data.ingest.ingest import IngestConfig, ingest
from pipeline.data.sample import Texts
from pipeline.data.sources.base import Record, fingerprint


def picture(number: int, width: int = 31, height: int = 23) -> bytes:
    """A small JPEG of coloured noise, another one for every number."""
    noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((width + number % 3, height)).save(buffer, "JPEG")
    return buffer.getvalue()


def pictures(count: int, first: int = 0) -> dict[str, bytes]:
    return {f"photo-{number}": picture(number) for number in range(first, first + count)}


@dataclass(frozen=True)
class PhotoSource:
    """Images by key, all of one split."""

    images: Mapping[str, bytes]

    def records(self) -> Iterator[Record]:
        for key, image in self.images.items():
            texts = Texts(image_id=key, captions=(f"caption of {key}",))
            digest = xxhash.xxh3_64_hexdigest(image)
            yield Record(key, "train", key, "jpg", texts.encoded(), fingerprint(digest))

    def read(self, record: Record) -> bytes:
        return self.images[record.image]


def make_dataset(url: str, images: Mapping[str, bytes], samples_per_shard: int = 4) -> None:
    """Brings the dataset at `url` to hold exactly these images."""
    config = IngestConfig(
        samples_per_shard=samples_per_shard,
        verify="header",
        shards_in_flight=0,
        max_removed_fraction=1,
    )
    ingest(PhotoSource(images), url, config)
