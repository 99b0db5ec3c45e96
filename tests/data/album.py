"""A source whose image files are made by tests, and pictures to put into it."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from PIL import Image

from pipeline.data.sample import Texts
from pipeline.data.sources.base import Record, Reject, fingerprint


@dataclass
class Album:
    """Image files by key, with their captions. Metadata is the file's digest unless set."""

    files: dict[str, bytes]
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)

    def records(self) -> Iterator[Record | Reject]:
        for key, payload in self.files.items():
            texts = Texts(key, captions=self.captions.get(key, (f"about {key}",)))
            stamp = self.metadata.get(key) or xxhash.xxh3_64_hexdigest(payload)
            split = self.splits.get(key, "train")
            yield Record(key, split, key, "png", texts.encoded(), fingerprint(stamp))

    def read(self, record: Record) -> bytes:
        self.reads.append(record.key)
        return self.files[record.image]


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def picture(seed: int, width: int = 48, height: int = 32) -> Image.Image:
    """Smooth blobs of colour: pictures of different seeds do not look alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
