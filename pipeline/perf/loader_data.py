"""Made-up datasets, as ingest and extract leave them, for a loader to read."""

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from msgspec.structs import replace

from pipeline import storage
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import FeaturePart, FeatureRow, SampleRow, State, to_table
from pipeline.data.read.dataset import Dataset, Split
from pipeline.data.read.extractor_card import ExtractorCard, write_card
from pipeline.data.read.images import LiveConfig
from pipeline.data.sample import Sample, Texts
from pipeline.data.tars.shard import ShardWriter
from pipeline.errors import ConfigError

SPLIT = "train"
EXTRACTOR = "grid-bench"  # as a card of this type and identity is called
GRID = 6, 6  # 36 regions a picture, as detectors give
SAMPLES_PER_SHARD = 256
PHOTOGRAPH = 480, 640  # height and width, as most of COCO's have
QUALITY = 90
_CAPTION = "a dog runs over a green field with two people behind it"


def feature_split(folder: str, num_samples: int, dim: int) -> Split:
    """Writes samples with a caption and GRID features of `dim` float16 values; opens them."""
    random = np.random.default_rng(0)
    values = random.standard_normal((GRID[0] * GRID[1], dim)).astype(np.float16)
    card = ExtractorCard(
        type="grid", identity="bench", config={}, weights=None, dim=dim, grid=GRID, boxes="grid"
    )
    write_card(folder, card)
    for numbers in _shards(num_samples):
        shard = _write_shard(folder, numbers, [b""] * len(numbers))
        rows = []
        with ShardWriter(storage.join(folder, "features", EXTRACTOR), shard) as writer:
            for number in numbers:
                values[0, 0] = number % 2048  # which float16 can tell apart
                member = writer.write(Sample(_key(number), {"npy": _npy(values)}))["npy"]
                rows.append(
                    FeatureRow(
                        key=_key(number),
                        shard=shard,
                        num_regions=len(values),
                        parts=(FeaturePart("values", *member),),
                    )
                )
        Manifest.open(folder).features(EXTRACTOR).commit(to_table(rows, FeatureRow))
    return Dataset.open(folder).split(SPLIT, EXTRACTOR)


def image_split(folder: str, images: Sequence[bytes], num_samples: int, live: LiveConfig) -> Split:
    """Writes samples with a caption and a JPEG, each of them as often as need be; opens them."""
    for numbers in _shards(num_samples):
        _write_shard(folder, numbers, [images[number % len(images)] for number in numbers])
    return Dataset.open(folder).split(SPLIT, live)


def photographs(count: int, images: str | None) -> list[bytes]:
    """Returns at most `count` JPEGs of a folder, or without one draws them.

    Those are clouds with grain, of the size in pixels and bytes that COCO's photographs have.
    Raises ConfigError if the folder has no JPEG.
    """
    if images is None:
        return [_draw(number) for number in range(count)]
    names = [
        name for name in storage.list_names(images) if name.lower().endswith((".jpg", ".jpeg"))
    ]
    if not names:
        raise ConfigError(f"images: {images}: expected a folder with .jpg files, found none")
    return [storage.read_bytes(storage.join(images, name)) for name in names[:count]]


def shard_paths(split: Split, folder: str, part: str) -> list[str]:
    """Returns the local tars of a dataset: `part` is `shards/<split>` or `features/<extractor>`."""
    location = storage.join(folder, part)
    names = [name for name in storage.list_names(location) if name.endswith(".tar")]
    assert len(names) == split.num_shards
    return [str(storage.local_path(storage.join(location, name))) for name in names]


def _shards(num_samples: int) -> Iterator[range]:
    for first in range(0, num_samples, SAMPLES_PER_SHARD):
        yield range(first, min(first + SAMPLES_PER_SHARD, num_samples))


def _write_shard(folder: str, numbers: Sequence[int], images: Sequence[bytes]) -> str:
    rows: list[SampleRow] = []
    with ShardWriter(storage.join(folder, "shards", SPLIT)) as writer:
        for number, image in zip(numbers, images, strict=True):
            texts = Texts(number, captions=(_CAPTION,))
            members = writer.write(Sample(_key(number), {"jpg": image, "json": texts.to_json()}))
            rows.append(
                SampleRow(
                    key=_key(number),
                    split=SPLIT,
                    state=State.LIVE,
                    image_fingerprint=str(number),
                    texts_fingerprint=str(number),
                    suffix="jpg",
                    image_offset=members["jpg"].offset,
                    image_size=members["jpg"].size,
                    texts_offset=members["json"].offset,
                    texts_size=members["json"].size,
                    num_captions=1,
                    num_questions=0,
                    num_rounds=0,
                )
            )
    shard = writer.shard.name
    rows = [replace(row, shard=shard, texts_shard=shard) for row in rows]
    Manifest.create(folder).commit(to_table(rows, SampleRow))
    return shard


def _draw(number: int) -> bytes:
    random = np.random.default_rng(number)
    height, width = PHOTOGRAPH
    pixels = random.normal(0, 9, (height, width, 3))
    for cell, strength in ((160, 45), (40, 25), (8, 12)):
        coarse = random.normal(0, strength, (-(-height // cell), -(-width // cell), 3))
        pixels += coarse.repeat(cell, axis=0).repeat(cell, axis=1)[:height, :width]
    clipped = np.clip(pixels + 128, 0, 255).astype(np.uint8)
    payload: bytes = simplejpeg.encode_jpeg(clipped, quality=QUALITY, colorsubsampling="420")
    return payload


def _npy(values: npt.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def _key(number: int) -> str:
    return f"sample-{number:07}"
