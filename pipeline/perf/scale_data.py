"""A synthetic dataset of any size: a Parquet table, the manifest that an ingest of it leaves.

Rows are made in columns, millions a second. Every row has the same small picture in its cell, and
every shard is the same file with the texts of one sample, to which all rows of the shard point:
listings, comparisons, indexes and reads of texts are real, images and disks are not needed.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import SAMPLES, State
from pipeline.data.sample import Sample, Texts
from pipeline.data.sources.digests import digests, in_hex
from pipeline.data.sources.table import TableSource, TableSourceConfig
from pipeline.data.sources.text_kernels import caption_texts
from pipeline.data.tars.shard import ShardWriter, shard_location
from pipeline.perf import photographs

SPLIT = "train"
_IMAGE_BYTES, _TEXTS_BYTES = 65_000, 300  # that a sample takes of a shard
_ROWS_A_GROUP = 50_000  # of the table
_ROWS_A_COMMIT = 1_000_000
_STRIDE = 2_654_435_761  # a prime: multiples of it visit all numbers in an order without a pattern
_SMALL_GROUP = 100  # rows, of inserted records: a group is unpacked to read an image
_MAX_LINKS = 30_000  # of one file; file systems allow 32,000 to 65,000

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ScaleData:
    """Where a synthetic dataset lies, and how large it is."""

    folder: Path
    num_samples: int
    num_shards: int

    @property
    def url(self) -> str:
        """The dataset."""
        return str(self.folder / "dataset")

    @property
    def table(self) -> Path:
        """The folder of Parquet files that it was made of."""
        return self.folder / "table"

    def write(self) -> None:
        """Writes the table, the manifest that has all of it, and the shards."""
        write_table(self.table / "0.parquet", 2 * np.arange(self.num_samples), _ROWS_A_GROUP)
        manifest = Manifest.create(self.url)
        for rows in self._manifest_rows():
            manifest = manifest.commit(rows)
        self._link_shards()

    def _manifest_rows(self) -> Iterator[pa.Table]:
        """Yields the rows of some shards at a time, whose keys come in no order."""
        file = str(self.table / "0.parquet")
        stamp = storage.stamp(file)
        for start in range(0, self.num_samples, _ROWS_A_COMMIT):
            places = np.arange(start, min(start + _ROWS_A_COMMIT, self.num_samples))
            lines = places * _STRIDE % self.num_samples
            yield _rows(2 * lines, *self._places(places), *_fingerprints(lines, file, stamp))

    def _places(self, places: Int64Array) -> tuple[pa.Array, Int64Array]:
        """Returns the shard of each sample, and its number in there."""
        shard = places * self.num_shards // self.num_samples
        first = -(-shard * self.num_samples // self.num_shards)
        return pa.array(self._shard_names).take(pa.array(shard)), places - first

    @cached_property
    def _shard_names(self) -> list[str]:
        return [f"{number:016x}" for number in range(self.num_shards)]

    def _link_shards(self) -> None:
        """Writes one shard and gives it the names of all, a copy for every so many of them."""
        for first in range(0, self.num_shards, _MAX_LINKS):
            with ShardWriter(storage.join(self.url, "shards", SPLIT)) as writer:
                writer.write(Sample("0", {"json": _TEXTS.to_json()}))
            written = shard_location(self.url, SPLIT, writer.shard.name)
            for name in self._shard_names[first : first + _MAX_LINKS]:
                os.link(written, shard_location(self.url, SPLIT, name))
            Path(written).unlink()


def table_source(table: Path) -> TableSource:
    """Returns the source of a folder of Parquet files."""
    return TableSourceConfig.model_validate(
        {
            "type": "table",
            "table": str(table),
            "image": "image",
            "key": "number",
            "texts": {"captions": "caption"},
            "validation_fraction": 0,
        }
    ).build()


def write_table(path: Path, numbers: npt.ArrayLike, rows_a_group: int = _SMALL_GROUP) -> None:
    """Writes a Parquet file with a number, a caption and a picture a row."""
    numbers = np.asarray(numbers, np.int64)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = pa.array([photographs.thumbnail()], pa.binary())
    schema = pa.schema(
        [
            ("number", pa.int64()),
            ("caption", pa.string()),
            ("image", pa.dictionary(pa.int32(), pa.binary())),
        ]
    )
    with pq.ParquetWriter(path, schema, store_schema=False) as writer:  # plain bytes, that is
        for start in range(0, len(numbers), rows_a_group):
            of_group = numbers[start : start + rows_a_group]
            cells = pa.DictionaryArray.from_arrays(np.zeros(len(of_group), np.int32), picture)
            columns = [pa.array(of_group), _captions(of_group), cells]
            writer.write_table(pa.table(columns, schema), row_group_size=rows_a_group)


def _rows(
    numbers: Int64Array,
    shard: pa.Array,
    place: Int64Array,
    image_fingerprints: pa.Array,
    texts_fingerprints: pa.Array,
) -> pa.Table:
    """Returns rows of live samples, as ingest lists them."""
    random = np.random.default_rng(int(numbers[0]))
    digest = [in_hex(random.integers(0, 2**64, len(numbers), np.uint64)) for _ in range(2)]
    offset = pa.array(place * (_IMAGE_BYTES + _TEXTS_BYTES))
    columns: dict[str, object] = {
        "key": pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 12, "0"),
        "split": SPLIT,
        "state": State.LIVE.value,
        "image_fingerprint": image_fingerprints,
        "texts_fingerprint": texts_fingerprints,
        "digest": pc.binary_join_element_wise(*digest, ""),
        "shard": shard,
        "suffix": "jpg",
        "image_offset": offset,
        "image_size": _IMAGE_BYTES,
        "texts_shard": shard,
        "texts_offset": _TEXTS_OFFSET,
        "texts_size": len(_TEXTS.to_json()),
        "num_captions": 1,
        "num_questions": 0,
        "num_rounds": 0,
        "width": photographs.THUMBNAIL[0],
        "height": photographs.THUMBNAIL[1],
    }
    fields = [field for field in SAMPLES if field.name != "sequence"]
    return pa.table(
        [_column(columns.get(field.name), field.type, len(numbers)) for field in fields],
        pa.schema(fields),
    )


def _column(value: object, kind: pa.DataType, length: int) -> pa.Array:
    if isinstance(value, pa.Array):
        return value.cast(kind)
    return pa.repeat(pa.scalar(value, kind), length)


def _fingerprints(lines: Int64Array, file: str, stamp: str) -> tuple[pa.Array, pa.Array]:
    """Returns what the table's source tells images and texts of these lines by."""
    group, index = (pa.array(part).cast(pa.string()) for part in divmod(lines, _ROWS_A_GROUP))
    numbers = 2 * lines
    location = pc.binary_join_element_wise(
        f"cell:{file}#", group, ":", index, f":image {stamp}", ""
    )
    found = caption_texts(pa.array(numbers).cast(pa.string()), [_captions(numbers)])
    assert found is not None
    texts, _ = found
    return in_hex(digests(location)), in_hex(digests(texts))


def _captions(numbers: Int64Array) -> pa.Array:
    number = pa.array(numbers).cast(pa.string())
    return pc.binary_join_element_wise("A picture of number ", number, ", in colour.", "")


_TEXTS = Texts(0, ("A picture of some number, in colour.",))
_TEXTS_OFFSET = 512  # in a shard: behind the header
