"""Small real datasets, written by the project's own shard writer and manifest."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash
from msgspec.structs import replace

from pipeline import storage
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import (
    FeaturePart,
    FeatureRow,
    SampleRow,
    State,
    part_suffix,
    to_table,
)
from pipeline.data.sample import Dialog, Question, Round, Sample, Texts
from pipeline.data.tars.shard import ShardWriter
from tests.data.cards import card_bytes

EXTRACTOR = "grid-0123abcd"


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def make_texts(number: int) -> Texts:
    """Sample n has n % 4 captions, n % 3 questions, and every fifth a dialog of two rounds."""
    rounds = (Round("what is it?", "a cat"), Round("what colour?", "grey"))
    return Texts(
        image_id=number,
        captions=tuple(f"caption {i} of {number}" for i in range(number % 4)),
        questions=tuple(Question(i, f"question {i}?", ("yes",)) for i in range(number % 3)),
        dialogs=(Dialog("a cat", rounds),) if number % 5 == 0 else (),
    )


def make_image(number: int) -> bytes:
    return b"image %d" % number * (number + 1)


@dataclass
class TinyDataset:
    """Writes shards one by one; `shards` lists the keys of each."""

    url: str
    shards: dict[str, list[str]] = field(default_factory=dict)
    image: Callable[[int], bytes] = make_image  # no real ones: few tests look at them

    def add_shard(self, split: str, numbers: Sequence[int]) -> str:
        rows = []
        with ShardWriter(storage.join(self.url, "shards", split)) as writer:
            for number in numbers:
                texts = make_texts(number)
                parts = {"jpg": self.image(number), "json": texts.to_json()}
                members = writer.write(Sample(f"sample-{number}", parts))
                rows.append(
                    SampleRow(
                        key=f"sample-{number}",
                        split=split,
                        state=State.LIVE,
                        image_fingerprint=str(number),
                        texts_fingerprint=str(len(self.shards)),
                        digest=xxhash.xxh3_128_hexdigest(parts["jpg"]),
                        suffix="jpg",
                        image_offset=members["jpg"].offset,
                        image_size=members["jpg"].size,
                        texts_offset=members["json"].offset,
                        texts_size=members["json"].size,
                        num_captions=len(texts.captions),
                        num_questions=len(texts.questions),
                        num_rounds=texts.num_rounds,
                        width=7,
                        height=5,
                    )
                )
        name = writer.shard.name
        rows = [replace(row, shard=name, texts_shard=name) for row in rows]
        Manifest.create(self.url).commit(to_table(rows, SampleRow))
        self.shards[name] = [f"sample-{number}" for number in numbers]
        return name

    def add_features(
        self,
        shard: str,
        values: Callable[[int], np.ndarray],
        boxes: Callable[[int], np.ndarray] | None = None,
        extractor: str = EXTRACTOR,
    ) -> None:
        rows = []
        with ShardWriter(storage.join(self.url, "features", extractor), shard) as writer:
            for key in self.shards[shard]:
                number = int(key.removeprefix("sample-"))
                parts = {"npy": npy(values(number))}
                if boxes is not None:
                    parts["boxes.npy"] = npy(boxes(number))
                members = writer.write(Sample(key, parts))
                rows.append(
                    FeatureRow(
                        key=key,
                        shard=shard,
                        num_regions=len(values(number)),
                        parts=tuple(
                            FeaturePart(name, *members[part_suffix(name)])
                            for name in ("values", "boxes")
                            if part_suffix(name) in parts
                        ),
                    )
                )
        Manifest.open(self.url).features(extractor).commit(to_table(rows, FeatureRow))

    def write_card(self, grid: list[int] | None, extractor: str = EXTRACTOR) -> None:
        location = storage.join(self.url, "features", extractor, "card.json")
        storage.write_bytes(location, card_bytes(grid=grid))


def grid_values(number: int) -> np.ndarray:
    """Six cells (2 x 3) of eight values."""
    return (np.arange(48).reshape(6, 8) + number).astype(np.float16)


def region_values(number: int) -> np.ndarray:
    """n % 5 regions of eight values."""
    return np.random.default_rng(number).random((number % 5, 8)).astype(np.float32)


def region_boxes(number: int) -> np.ndarray:
    return np.random.default_rng(number + 1000).random((number % 5, 4)).astype(np.float32)


def make_dataset(url: str, num_samples: int = 23, samples_per_shard: int = 4) -> TinyDataset:
    """A train split with grid features and a val split of three samples without."""
    dataset = TinyDataset(url)
    dataset.write_card([2, 3])
    for start in range(0, num_samples, samples_per_shard):
        numbers = range(start, min(start + samples_per_shard, num_samples))
        dataset.add_features(dataset.add_shard("train", numbers), grid_values)
    dataset.add_shard("val", [101, 102, 103])
    return dataset
