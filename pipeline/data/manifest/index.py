"""The index of a version by shard: what readers hold of a dataset, whose rows they never hold.

A table of rows says of each sample where it lies. Ranks that open a split need two things of it:
totals of every shard, from which the order of training is computed, and the rows of the shards
they are about to read. The index has both, derived once from the version's table:

    DATASET/manifest/index/<version>-<digest>/   the digest names what it was derived of
        rows.arrow      an Arrow stream; one record batch a shard, its rows in reading order
        shards.arrow    split, name, totals of each shard, and where its batch lies
        files.arrow     the files that parts of samples lie in
        index.json      size and digest of the two tables, written last: with it the index is whole

So memory and start-up follow the number of shards. An index of its own, rather than the table's
files sorted by shard and pruned by row groups, because the newest row of a key may be in any of
them, which only a pass over all keys can tell; because a shard's rows are then one read of some
100 KB, from a disk or an object store alike; and because the table stays as ingest appends to it.
Batches are read rather than mapped: pages that processes of a machine share lie in the system's
cache either way, a read is checked against its digest, and a file that is replaced or cut short
meanwhile is an error that can be handled, where a mapped page would end the process. An index that
is damaged, or of another format, is not believed but made anew; it has the same bytes and the
same name whoever makes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from pipeline import storage
from pipeline.data.manifest.schema import SAMPLES, Int64Array
from pipeline.data.sample import TextKind
from pipeline.digest import digest_of
from pipeline.errors import StorageError

FORMAT = 1
KINDS: tuple[TextKind, ...] = ("captions", "questions", "rounds")
NO_FILE = -1

# Of rows.arrow, beside `key`. With features come `num_regions`, and `<part>_offset` and
# `<part>_size` of each array.
ROW_NUMBERS = (
    "image_file",
    "image_offset",
    "image_size",
    "texts_file",
    "texts_offset",
    "texts_size",
    "num_captions",
    "num_questions",
    "num_rounds",
)

SHARDS = pa.schema(
    [
        ("split", pa.string()),
        ("shard", pa.string()),
        ("num_rows", pa.int64()),
        *((f"num_{kind}", pa.int64()) for kind in KINDS),
        *((f"num_with_{kind}", pa.int64()) for kind in KINDS),  # rows that have some
        ("num_rejects", pa.int64()),  # further live samples, of which there are no features
        ("num_missing", pa.int64()),  # yet further ones, of which none were listed
        ("first_missing", pa.string()),  # the key of one
        ("offset", pa.int64()),  # of its batch in rows.arrow, in bytes
        ("size", pa.int64()),
        ("digest", pa.string()),  # xxh3_64 of the batch, in hex
    ]
)

# A shard of ours, or somebody else's tar.
FILES = pa.schema([SAMPLES.field(name) for name in ("split", "shard", "tar")])

SHARDS_HELD = 24  # whose rows a reader keeps: two windows of the order, and some


class FileDigest(msgspec.Struct, frozen=True):
    """The size of a file in bytes, and its xxh3_128 in hex."""

    size: int
    digest: str

    @classmethod
    def of(cls, payload: bytes) -> "FileDigest":
        """Returns that of a file's bytes."""
        return cls(len(payload), digest_of(payload))


class IndexCard(msgspec.Struct, frozen=True):
    """What index.json says."""

    format: int
    parts: tuple[str, ...] | None  # the arrays that the features have; None of one without
    shards: FileDigest
    files: FileDigest


class DamagedIndexError(Exception):
    """An index that is not there, not whole, or of another format: to be made anew."""


@dataclass(frozen=True)
class ShardRows:
    """The rows of one shard."""

    keys: npt.NDArray[np.object_]  # (n,) str
    numbers: Int64Array  # (n, C), the columns as `Index.columns` names them


class Index:
    """A whole index, held as its totals."""

    def __init__(self, folder: str, card: IndexCard, shards: pa.Table, files: pa.Table) -> None:
        self.folder = folder
        self.parts = card.parts
        self.shards = shards
        self.files = files
        self._schema = row_schema(card.parts)
        self.columns = tuple(self._schema.names[1:])

    @classmethod
    def read(cls, folder: str) -> "Index":
        """Reads an index's totals; raises DamagedIndexError."""
        try:
            card = msgspec.json.decode(
                storage.read_bytes(storage.join(folder, "index.json")), type=IndexCard
            )
            if card.format != FORMAT:
                raise DamagedIndexError(f"{folder}: of format {card.format}")
            shards = _table(storage.join(folder, "shards.arrow"), card.shards)
            files = _table(storage.join(folder, "files.arrow"), card.files)
        except (StorageError, msgspec.DecodeError, pa.ArrowException) as error:
            raise DamagedIndexError(f"{folder}: {error}") from error
        return cls(folder, card, shards, files)

    def split_sizes(self) -> dict[str, int]:
        """Returns the number of live samples of each split, by name, features or not."""
        numbers = sum(
            self.shards[name].to_numpy() for name in ("num_rows", "num_rejects", "num_missing")
        )
        splits, place = np.unique(self.shards["split"].to_numpy(), return_inverse=True)
        sizes = np.bincount(place, numbers, len(splits)).astype(np.int64)
        return dict(zip(splits.tolist(), sizes.tolist(), strict=True))

    def rows(self, shard: int) -> ShardRows:
        """Reads the rows of a shard, by its number; raises DamagedIndexError."""
        location = storage.join(self.folder, "rows.arrow")
        offset, size, digest = (
            self.shards[name][shard].as_py() for name in ("offset", "size", "digest")
        )
        try:
            payload = storage.read_range(location, offset, size)
        except StorageError as error:
            raise DamagedIndexError(str(error)) from error
        if xxhash.xxh3_64_hexdigest(payload) != digest:
            raise DamagedIndexError(f"{location}: other bytes at {offset} than were written")
        batch = pa.ipc.read_record_batch(pa.py_buffer(payload), self._schema)
        numbers = np.empty((batch.num_rows, len(self.columns)), np.int64)
        for i, name in enumerate(self.columns):
            numbers[:, i] = batch[name].to_numpy()
        return ShardRows(batch["key"].to_numpy(zero_copy_only=False), numbers)


def row_schema(parts: Sequence[str] | None) -> pa.Schema:
    """Returns the columns of rows.arrow."""
    numbers = {name: pa.int32() if name.startswith("num_") else pa.int64() for name in ROW_NUMBERS}
    numbers |= {"image_file": pa.int32(), "texts_file": pa.int32()}
    if parts is not None:
        numbers |= {"num_regions": pa.int32(), **dict.fromkeys(part_columns(parts), pa.int64())}
    return pa.schema([("key", pa.string()), *numbers.items()])


def part_columns(parts: Sequence[str]) -> list[str]:
    """Returns the columns that say where arrays lie."""
    return [f"{part}_{place}" for part in parts for place in ("offset", "size")]


def _table(location: str, expected: FileDigest) -> pa.Table:
    payload = storage.read_bytes(location)
    if FileDigest.of(payload) != expected:
        raise DamagedIndexError(f"{location}: not the bytes that were written")
    return pa.ipc.open_file(pa.py_buffer(payload)).read_all()
