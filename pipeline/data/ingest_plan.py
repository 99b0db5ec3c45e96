"""Compares a source's listing with a manifest: what is to be written, removed or left alone.

No image is opened here. A record is left alone when the manifest has its split and fingerprint,
whether it became a sample or a reject; but a copy of an image is looked at again when the sample
that it was a copy of is no longer there as it was.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline.data.manifest import LIVE, REJECT, REMOVED, SAMPLES, Manifest
from pipeline.data.sample import check_key, safe_key
from pipeline.data.sources.base import Record, Reject, Source, same_image
from pipeline.data.treatment import Treatment
from pipeline.errors import SourceError

_LISTING_CHUNK = 8192  # records compared with the manifest at once

# Records to be written. Tables, because a listing of millions would not fit as Python objects.
CHANGED = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("image", pa.string()),
        ("suffix", pa.string()),
        ("texts", pa.binary()),  # canonical JSON
        ("fingerprint", pa.string()),
        ("detail", pa.string()),
        ("perceptual_hash", pa.int64()),  # once the image was looked at for that; else null
    ]
)

# What a sample's image is recognised by, should another be a copy of it.
HOLDERS = pa.schema(
    [("key", pa.string()), ("source_digest", pa.string()), ("perceptual_hash", pa.int64())]
)

Hashes = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ShardPlan:
    """The records that go into one shard: a plain message to whoever writes it."""

    url: str
    split: str
    records: pa.Table  # schema CHANGED, in the shard's order
    known: pa.Table  # schema SAMPLES: the live rows that some of them had until now
    keep_images: bool  # only texts changed: the shard holds no images, the old rows say where
    treatment: Treatment
    # Schema SAMPLES: rejects that were found before writing, to be listed with the shard.
    left_out: pa.Table = field(default_factory=SAMPLES.empty_table)


@dataclass(frozen=True)
class IngestPlan:
    """What a run has to do."""

    manifest: Manifest
    changed: pa.Table  # schema CHANGED, in the order of the keys' hashes
    known: pa.Table  # schema SAMPLES: the live rows of changed keys
    settled: pa.Table  # schema SAMPLES: rows that need no image, listed rejects and removals
    rejects: pa.Table  # reason and detail of the listed rejects and the unchanged ones
    num_listed: int
    num_added: int
    num_edited: int
    num_removed: int

    @property
    def num_unchanged(self) -> int:
        """The listed records that the manifest has as they are."""
        return self.num_listed - self.num_added - self.num_edited

    def shards(self, samples_per_shard: int, treatment: Treatment) -> Iterator[ShardPlan]:
        """Cuts the changed records into shards: of one split, with images or without."""
        old_row, keeps_image = self._old_rows()
        split_of_row = np.array(self.changed["split"].to_pylist(), object)
        for split in sorted(set(split_of_row)):
            for keep_images in (False, True):
                rows = np.flatnonzero((split_of_row == split) & (keeps_image == keep_images))
                for start in range(0, len(rows), samples_per_shard):
                    part = rows[start : start + samples_per_shard]
                    before = old_row[part]
                    yield ShardPlan(
                        url=self.manifest.url,
                        split=split,
                        records=self.changed.take(part),
                        known=self.known.take(before[before >= 0]),
                        keep_images=keep_images,
                        treatment=treatment,
                    )

    def holders(self) -> pa.Table:
        """Returns the live samples whose images this run leaves as they are; schema HOLDERS."""
        samples = self.manifest.samples([*HOLDERS.names, "digest"])
        _, keeps_image = self._old_rows()
        rewritten = self.changed["key"].filter(pa.array(~keeps_image))
        gone = [*rewritten.chunks, *self.settled["key"].chunks]
        gone_keys = pa.chunked_array(gone, pa.string()).combine_chunks()
        samples = samples.filter(pc.invert(pc.is_in(samples["key"], value_set=gone_keys)))
        digest = pc.coalesce(samples["source_digest"], samples["digest"])
        place = samples.schema.get_field_index("source_digest")
        return samples.set_column(place, "source_digest", digest).select(HOLDERS.names)

    def _old_rows(self) -> tuple[Int64Array, BoolArray]:
        """Returns for each changed record its row in `known`, or -1, and if its image stays."""
        old_row = pc.index_in(self.changed["key"], value_set=self.known["key"].combine_chunks())
        old_row = pc.fill_null(old_row, -1).to_numpy()
        keeps_image = np.zeros(self.changed.num_rows, bool)
        edited = np.flatnonzero(old_row >= 0)
        keeps_image[edited] = _same_images(
            self.changed.take(edited), self.known.take(old_row[edited])
        )
        return old_row, keeps_image


def plan_ingest(source: Source, manifest: Manifest) -> IngestPlan:
    """Compares a source's listing with a manifest.

    The second and later records of a key become `duplicate-id` rejects under keys of their own.
    Raises SourceError if nothing is listed: an empty listing would remove every sample.
    """
    rows = manifest.rows(
        ["key", "split", "state", "reason", "detail", "fingerprint", "duplicate_of"]
    )
    rows = rows.filter(pc.not_equal(rows["state"], REMOVED)).combine_chunks()
    known, seen = _Known(rows), _Seen()
    is_copy = np.asarray(pc.is_valid(rows["duplicate_of"]))
    copies = [CHANGED.empty_table()]
    changed, settled = [CHANGED.empty_table()], [SAMPLES.empty_table()]
    listed, unchanged = np.zeros((2, rows.num_rows), bool)
    num_listed = num_changed = 0
    entries = iter(source.records())
    while chunk := list(islice(entries, _LISTING_CHUNK)):
        hashes = seen.rename_copies(chunk)
        row = known.find(hashes)
        for i in np.flatnonzero(row < 0):
            check_key(chunk[i].key)
        same = known.says(row, chunk)
        listed[row[row >= 0]] = True
        unchanged[row[same]] = True
        fresh = [chunk[i] for i in np.flatnonzero(~same)]
        changed.append(_to_write([entry for entry in fresh if isinstance(entry, Record)]))
        if same.any() and is_copy[row[same]].any():
            unmoved = [chunk[i] for i in np.flatnonzero(same) if is_copy[row[i]]]
            copies.append(_to_write([entry for entry in unmoved if isinstance(entry, Record)]))
        settled.append(_rejected([entry for entry in fresh if isinstance(entry, Reject)]))
        num_listed += len(chunk)
        num_changed += len(fresh)
    if not num_listed:
        raise SourceError(
            f"{manifest.url}: the source lists no record at all; nothing was changed, because "
            "an empty listing would remove every sample"
        )
    freed = _without_original(rows, known, listed & unchanged)
    unchanged &= ~freed
    changed += [_of_keys(table, rows["key"].filter(pa.array(freed))) for table in copies]
    num_changed += int(np.count_nonzero(freed))
    removed = rows.filter(pa.array(~listed))
    old_rejects = rows.filter(pc.and_(pa.array(unchanged), pc.equal(rows["state"], REJECT)))
    to_write = pa.concat_tables(changed)
    to_write = to_write.take(np.argsort(_column_hashes(to_write["key"]), kind="stable"))
    num_edited = int(np.count_nonzero(listed & ~unchanged))
    why = ["reason", "detail"]
    return IngestPlan(
        manifest=manifest,
        changed=to_write,
        known=_live_rows(manifest, to_write["key"]),
        settled=pa.concat_tables([*settled, _removals(removed)]),
        rejects=pa.concat_tables([table.select(why) for table in (*settled, old_rejects)]),
        num_listed=num_listed,
        num_added=num_changed - num_edited,
        num_edited=num_edited,
        num_removed=removed.num_rows,
    )


def _without_original(rows: pa.Table, known: "_Known", stays: BoolArray) -> BoolArray:
    """Says which rows that stay are copies of a sample that does not stay as it is."""
    freed = np.zeros(rows.num_rows, bool)
    copies = np.flatnonzero(np.asarray(pc.is_valid(rows["duplicate_of"])) & stays)
    if len(copies):
        original = known.find(_column_hashes(rows["duplicate_of"].take(pa.array(copies))))
        live = np.asarray(pc.equal(rows["state"], LIVE)) & stays
        freed[copies] = (original < 0) | ~live[original]
    return freed


def _of_keys(records: pa.Table, keys: pa.ChunkedArray) -> pa.Table:
    return records.filter(pc.is_in(records["key"], value_set=keys.combine_chunks()))


class _Known:
    """The rows of a manifest, found by hashes of 64 bits.

    A hundred million keys may share these safely.
    """

    def __init__(self, rows: pa.Table) -> None:
        hashes = _column_hashes(rows["key"])
        self._row = np.argsort(hashes)
        self._hashes = hashes[self._row]
        self._identity = rows.select(["split", "fingerprint"])

    def find(self, hashes: Hashes) -> Int64Array:
        """Returns each key's row, or -1 if it has none."""
        if not len(self._hashes):
            return np.full(len(hashes), -1)
        place = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        return np.where(self._hashes[place] == hashes, self._row[place], -1)

    def says(self, row: Int64Array, entries: Sequence[Record | Reject]) -> BoolArray:
        """Returns whether the row of each entry, if it has one, says the same as the entry."""
        here = pa.array(row, mask=row < 0)
        there = self._identity.take(here)
        split = pa.array([entry.split for entry in entries], pa.string())
        fingerprint = pa.array([_fingerprint(entry) for entry in entries], pa.string())
        same = pc.and_(pc.equal(there["split"], split), pc.equal(there["fingerprint"], fingerprint))
        found: BoolArray = pc.fill_null(same, False).to_numpy()
        return found


class _Seen:
    """The hashes of the keys listed so far, in a few sorted arrays: 8 bytes a key."""

    def __init__(self) -> None:
        self._sorted: list[Hashes] = []  # each is at least twice as long as the next
        self._num_copies: Counter[str] = Counter()

    def rename_copies(self, entries: list[Record | Reject]) -> Hashes:
        """Makes the second and later entries of a key rejects, in place, with keys of their own.

        Returns the hash of each entry's key.
        """
        hashes = _hashes(entry.key for entry in entries)
        distinct, first = np.unique(hashes, return_index=True)
        copies = np.ones(len(entries), bool)
        copies[first] = self._has(distinct)
        taken = {int(value) for value in hashes[~copies]} if copies.any() else set()
        for i in np.flatnonzero(copies):
            entries[i] = self._rename(entries[i], taken)
            hashes[i] = xxhash.xxh3_64_intdigest(entries[i].key.encode())
            taken.add(int(hashes[i]))
        self._add(np.sort(hashes))
        return hashes

    def _rename(self, entry: Record | Reject, taken: set[int]) -> Reject:
        key = entry.key
        while (hashed := xxhash.xxh3_64_intdigest(key.encode())) in taken or self._has_one(hashed):
            self._num_copies[entry.key] += 1
            key = safe_key(f"{entry.key}-duplicate-{self._num_copies[entry.key] + 1}")
        detail = f"key {entry.key} is listed more than once; its first record holds"
        return Reject(key, entry.split, "duplicate-id", detail, entry.fingerprint)

    def _has_one(self, hashed: int) -> bool:
        return bool(self._has(np.array([hashed], np.uint64))[0])

    def _has(self, hashes: Hashes) -> BoolArray:
        found = np.zeros(len(hashes), bool)
        for known in self._sorted:
            place = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            found |= known[place] == hashes
        return found

    def _add(self, hashes: Hashes) -> None:
        while self._sorted and len(self._sorted[-1]) < 2 * len(hashes):
            hashes = np.concatenate([self._sorted.pop(), hashes])
            hashes.sort(kind="stable")  # which merges what is sorted already
        self._sorted.append(hashes)


def _fingerprint(entry: Record | Reject) -> str:
    """A listed reject's starts with the reason: the same files may be judged anew one day."""
    if isinstance(entry, Reject):
        return f"{entry.reason}:{entry.fingerprint}"
    return entry.fingerprint


def _hashes(texts: Iterable[str]) -> Hashes:
    return np.fromiter(map(xxhash.xxh3_64_intdigest, map(str.encode, texts)), np.uint64)


def _column_hashes(column: pa.ChunkedArray) -> Hashes:
    """As `_hashes`, with few of a column's strings in Python at a time."""
    parts = range(0, len(column), _LISTING_CHUNK)
    hashes = [_hashes(column.slice(start, _LISTING_CHUNK).to_pylist()) for start in parts]
    return np.concatenate([np.empty(0, np.uint64), *hashes])


def _same_images(changed: pa.Table, known: pa.Table) -> list[bool]:
    """Says for each pair of rows whether the sample's image can stay where it is."""
    columns = ["split", "suffix", "fingerprint"]
    pairs = zip(changed.select(columns).to_pylist(), known.select(columns).to_pylist(), strict=True)
    return [
        new["split"] == old["split"]
        and new["suffix"] == old["suffix"]
        and same_image(new["fingerprint"], old["fingerprint"])
        for new, old in pairs
    ]


def _to_write(records: Sequence[Record]) -> pa.Table:
    return pa.Table.from_pydict(
        {
            "key": [record.key for record in records],
            "split": [record.split for record in records],
            "image": [record.image for record in records],
            "suffix": [record.suffix for record in records],
            "texts": [record.texts.to_json() for record in records],
            "fingerprint": [record.fingerprint for record in records],
            "detail": [record.detail for record in records],
            "perceptual_hash": [None] * len(records),
        },
        CHANGED,
    )


def _rejected(rejects: Sequence[Reject]) -> pa.Table:
    return _rows(
        key=[reject.key for reject in rejects],
        split=[reject.split for reject in rejects],
        state=[REJECT] * len(rejects),
        reason=[reject.reason for reject in rejects],
        detail=[reject.detail for reject in rejects],
        fingerprint=[_fingerprint(reject) for reject in rejects],
    )


def _removals(rows: pa.Table) -> pa.Table:
    return _rows(
        key=rows["key"],
        split=rows["split"],
        state=[REMOVED] * rows.num_rows,
        reason=[""] * rows.num_rows,
        detail=[""] * rows.num_rows,
        fingerprint=rows["fingerprint"],
    )


def _rows(**columns: Sequence[str] | pa.ChunkedArray) -> pa.Table:
    """Returns rows of the manifest with these columns, the others null."""
    num_rows = len(columns["key"])
    return pa.Table.from_pydict(
        {
            column.name: columns.get(column.name, pa.nulls(num_rows, column.type))
            for column in SAMPLES
        },
        SAMPLES,
    )


def _live_rows(manifest: Manifest, keys: pa.ChunkedArray) -> pa.Table:
    if not len(keys) or not manifest.version:  # the first ingest has nothing to look up
        return SAMPLES.empty_table()
    rows = manifest.samples()
    return rows.filter(pc.is_in(rows["key"], value_set=keys.combine_chunks()))
