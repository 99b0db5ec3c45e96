"""The making of an index by shard, of a version's table, in bounded memory."""

import contextlib
import fcntl
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline import storage
from pipeline.data.manifest.engine import Engine, identifier, literal
from pipeline.data.manifest.index import (
    FILES,
    FORMAT,
    KINDS,
    ROW_NUMBERS,
    SHARDS,
    DamagedIndexError,
    FileDigest,
    Index,
    IndexCard,
    row_schema,
)
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import State
from pipeline.data.manifest.versions import Kept
from pipeline.errors import StorageError

_COLUMNS = (
    "key",
    "split",
    "state",
    "shard",
    "tar",
    "image_offset",
    "image_size",
    "texts_shard",
    "texts_offset",
    "texts_size",
    "num_captions",
    "num_questions",
    "num_rounds",
)
_OF_FEATURES = ("key", "shard", "num_regions", "parts", "reason")

# Where parts lie is a few strings in many rows: they are numbered before the rows are sorted.
_NUMBERED = (
    "CREATE TEMP TABLE places AS SELECT DISTINCT split, shard, texts_shard, tar FROM samples "
    f"WHERE state = '{State.LIVE}'",
    "CREATE TEMP TABLE shards AS "
    "SELECT split, shard, row_number() OVER (ORDER BY split, shard) - 1 AS number "
    "FROM (SELECT DISTINCT split, shard FROM places)",
    "CREATE TEMP TABLE files AS SELECT split, shard, tar, "
    "row_number() OVER (ORDER BY tar IS NOT NULL, split, shard, tar) - 1 AS number FROM ("
    "SELECT split, shard, NULL AS tar FROM places "
    "UNION SELECT split, texts_shard, NULL FROM places "
    "UNION SELECT NULL, NULL, tar FROM places WHERE tar IS NOT NULL)",
    "CREATE TEMP TABLE codes AS SELECT places.*, shards.number AS shard_number, "
    "coalesce(tars.number, images.number) AS image_file, texts.number AS texts_file FROM places "
    "JOIN shards ON shards.split = places.split AND shards.shard = places.shard "
    "JOIN files images ON images.split = places.split AND images.shard = places.shard "
    "JOIN files texts ON texts.split = places.split AND texts.shard = places.texts_shard "
    "LEFT JOIN files tars ON tars.tar = places.tar",
)


def open_index(manifest: Manifest, extractor: str | None, cache: Path) -> Index:
    """Returns the index of a version, with an extractor's features if it is named.

    It is read where it is, beside the table or in the folder `cache`, and made if it is nowhere:
    by one process of a machine, for which the others wait. Where the dataset cannot be written to
    it comes into the cache.
    """
    folders = _folders(manifest, extractor, cache)
    found = _found(folders)
    while found is None:
        with _alone(Path(f"{folders[-1]}.lock")):
            found = _found(folders)
            if found is None:
                _build_in_one_of(folders, manifest, extractor)
        folders = _folders(manifest, extractor, cache)  # features may have been added meanwhile
        found = _found(folders)
    return found


def remake_index(
    manifest: Manifest, extractor: str | None, cache: Path, damaged: Index, shard: int
) -> Index:
    """Returns an index anew, of which a shard's rows are damaged."""
    folders = _folders(manifest, extractor, cache)
    with _alone(Path(f"{folders[-1]}.lock")):
        with contextlib.suppress(DamagedIndexError):  # unless another process has made it by now
            index = Index.read(damaged.folder)
            index.rows(shard)
            return index
        return Index.read(_build_in_one_of(folders, manifest, extractor))


def build_index(manifest: Manifest, extractor: str | None, folder: str) -> None:
    """Makes the index of a version in a folder, over what is there; raises StorageError."""
    with Engine() as engine, _published(folder, "rows.arrow") as rows:
        manifest.register(engine, "samples", _COLUMNS)
        for statement in _NUMBERED:
            engine.run(statement)
        parts: tuple[str, ...] | None = None
        if extractor is not None:
            manifest.features(extractor).register(engine, "features", _OF_FEATURES)
            named = engine.table(
                "SELECT DISTINCT part.name FROM (SELECT unnest(parts) AS part FROM features) "
                "ORDER BY ALL"
            )
            parts = tuple(named["name"].to_pylist())
        names = engine.table("SELECT split, shard FROM shards ORDER BY number")
        schema = row_schema(parts)
        rows.write(schema.serialize())
        totals = [_write_shard(rows, schema, shard, names) for shard in _shards(engine, parts)]
        shards = _as_file(pa.Table.from_pylist(totals, SHARDS))
        files = engine.table("SELECT split, shard, tar FROM files ORDER BY number")
    files_payload = _as_file(files.cast(FILES))
    storage.write_bytes(storage.join(folder, "shards.arrow"), shards)
    storage.write_bytes(storage.join(folder, "files.arrow"), files_payload)
    card = IndexCard(FORMAT, parts, FileDigest.of(shards), FileDigest.of(files_payload))
    storage.write_bytes(storage.join(folder, "index.json"), msgspec.json.encode(card))


def _shards(engine: Engine, parts: Sequence[str] | None) -> Iterator[pa.Table]:
    """Yields the live samples of each shard, in reading order; with features, what of them."""
    columns = ["shard_number", "samples.key AS key", *ROW_NUMBERS]
    features = ""
    if parts is not None:
        features = (
            "LEFT JOIN features ON features.key = samples.key AND features.shard = samples.shard"
        )
        columns += ["features.key IS NULL AS is_missing", "reason IS NOT NULL AS is_rejected"]
        columns += ["num_regions"]
        for part in parts:
            named = f"list_filter(parts, lambda part: part.name = {literal(part)})[1]"
            columns += [
                f'coalesce({named}."{place}", -1) AS {identifier(f"{part}_{place}")}'
                for place in ("offset", "size")
            ]
    batches = engine.batches(
        f"SELECT {', '.join(columns)} FROM samples JOIN codes "
        "ON codes.split = samples.split AND codes.shard = samples.shard "
        "AND codes.texts_shard = samples.texts_shard "
        f"AND codes.tar IS NOT DISTINCT FROM samples.tar {features} "
        f"WHERE samples.state = '{State.LIVE}' ORDER BY shard_number, image_offset, samples.key"
    )
    pieces: list[pa.RecordBatch] = []
    for batch in batches:
        number = batch["shard_number"].to_numpy()
        starts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist()]
        for start, stop in zip(starts, [*starts[1:], len(number)], strict=True):
            if pieces and pieces[0]["shard_number"][0].as_py() != number[start]:
                yield pa.Table.from_batches(pieces)
                pieces = []
            pieces.append(batch.slice(start, stop - start))
    if pieces:
        yield pa.Table.from_batches(pieces)


def _write_shard(
    file: BinaryIO, schema: pa.Schema, shard: pa.Table, names: pa.Table
) -> dict[str, object]:
    """Writes a shard's usable rows as one batch; returns its row of shards.arrow."""
    number = shard["shard_number"][0].as_py()
    found: dict[str, object] = {name: names[name][number].as_py() for name in names.column_names}
    found |= {"num_rejects": 0, "num_missing": 0, "first_missing": None}
    if "is_missing" in shard.column_names:
        missing, rejected = shard["is_missing"], shard["is_rejected"]
        found["num_missing"] = pc.sum(missing).as_py()
        found["num_rejects"] = pc.sum(rejected).as_py()
        if found["num_missing"]:
            found["first_missing"] = shard["key"][pc.index(missing, True).as_py()].as_py()
        shard = shard.filter(pc.invert(pc.or_(missing, rejected)))
    usable = shard.select(schema.names).cast(schema).combine_chunks()
    for kind in KINDS:
        counts = usable[f"num_{kind}"].to_numpy()
        found[f"num_{kind}"] = int(counts.sum(dtype=np.int64))
        found[f"num_with_{kind}"] = int(np.count_nonzero(counts))
    (batch,) = usable.to_batches() or [pa.RecordBatch.from_pylist([], schema)]
    payload = batch.serialize()
    found |= {"num_rows": batch.num_rows, "offset": file.tell(), "size": payload.size}
    found["digest"] = xxhash.xxh3_64_hexdigest(payload)
    file.write(payload)
    return found


def _as_file(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    payload: bytes = sink.getvalue().to_pybytes()
    return payload


@contextlib.contextmanager
def _published(folder: str, name: str) -> Iterator[BinaryIO]:
    with storage.publish(storage.join(folder, name)) as path, path.open("wb") as file:
        yield file


@dataclass(frozen=True)
class IndexName:
    """What an index was made of, as its folder has it."""

    version: int
    rows: str  # digest of the table's files
    extractor: str = ""
    features: str = ""  # digest of its table's files

    @classmethod
    def of(cls, manifest: Manifest, extractor: str | None) -> "IndexName":
        """Returns the name of a version's index."""
        if extractor is None:
            return cls(manifest.version, manifest.digest())
        features = manifest.features(extractor).digest()
        return cls(manifest.version, manifest.digest(), extractor, features)

    @classmethod
    def parse(cls, folder: str) -> "IndexName | None":
        """Returns the name that a folder has, or None of something else."""
        found = _NAME.fullmatch(folder)
        if found is None:
            return None
        version, rows, features, extractor = found.groups()
        return cls(int(version), rows, extractor or "", features or "")

    def __str__(self) -> str:
        name = f"{self.version:08d}-{self.rows}"
        return f"{name}-{self.features}-{self.extractor}" if self.extractor else name


_NAME = re.compile(r"(\d{8,})-([0-9a-f]{16})(?:-([0-9a-f]{16}|none)-(.+))?")


def remove_unused_indexes(manifest: Manifest, kept: Kept, since: datetime) -> None:
    """Removes indexes of versions that are not kept, and of features as they no longer are.

    Those that were made `since` a time stay. What is removed and asked for again is made again.
    """
    folder = index_folder(manifest.url)
    features = {name: manifest.features(name).digest() for name in manifest.extractors()}
    for entry in storage.list_names(folder):
        name = IndexName.parse(entry)
        if name is None:
            continue
        if name.version in kept and features.get(name.extractor, "") == name.features:
            continue
        status = storage.file_status(storage.join(folder, entry, "index.json"))
        if status is None or status.modified < since.timestamp():
            storage.remove(storage.join(folder, entry))


def _folders(manifest: Manifest, extractor: str | None, cache: Path) -> tuple[str, str]:
    """Returns where an index may lie: beside the table, and on this machine."""
    name = str(IndexName.of(manifest, extractor))
    dataset = xxhash.xxh3_64_hexdigest(storage.absolute(manifest.url).encode())
    return storage.join(index_folder(manifest.url), name), str(cache / "index" / dataset / name)


def index_folder(url: str) -> str:
    """Returns where a dataset keeps its indexes."""
    return storage.join(url, "manifest", "index")


def _found(folders: Sequence[str]) -> Index | None:
    for folder in folders:
        with contextlib.suppress(DamagedIndexError):
            return Index.read(folder)
    return None


def _build_in_one_of(folders: Sequence[str], manifest: Manifest, extractor: str | None) -> str:
    """Makes the index in the first folder that can be written to; returns which."""
    for folder in folders[:-1]:
        with contextlib.suppress(StorageError):
            build_index(manifest, extractor, folder)
            return folder
    build_index(manifest, extractor, folders[-1])
    return folders[-1]


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Holds a lock against all processes of this machine; the system frees it when one dies."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
