"""The ingest plan: what is to be written, removed or left alone.

No image is opened here. A record is left alone when the manifest has its split and fingerprint,
whether it became a sample or a reject; but a copy of an image is looked at again when the sample
that it was a copy of is no longer there as it was. The records of a tar that was not even opened,
because the manifest has them all, are left alone together.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline.data.ingest.treatment import Treatment
from pipeline.data.manifest.manifest import LIVE, REJECT, REMOVED, SAMPLES, Manifest
from pipeline.data.sample import check_key, safe_key
from pipeline.data.sources.base import Record, Reject, Source, same_image
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
        ("tar", pa.string()),  # that the image stays in; else null
        ("image_offset", pa.int64()),  # in that tar; else -1
        ("image_size", pa.int64()),
        ("perceptual_hash", pa.int64()),  # once the image was looked at for that; else null
    ]
)

# What a sample's image is recognised by, should another be a copy of it.
HOLDERS = pa.schema(
    [("key", pa.string()), ("source_digest", pa.string()), ("perceptual_hash", pa.int64())]
)

_LOST = pa.schema([("key", pa.string()), ("reason", pa.string())])

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
    held: pa.Table  # state and reason of what the manifest has before anything is done
    lost: pa.Table  # key and reason of live samples that are rejects now, or, "", listed no more
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
                for part in self._cut(rows, samples_per_shard, keep_images):
                    before = old_row[part]
                    yield ShardPlan(
                        url=self.manifest.url,
                        split=split,
                        records=self.changed.take(part),
                        known=self.known.take(before[before >= 0]),
                        keep_images=keep_images,
                        treatment=treatment,
                    )

    def _cut(
        self, rows: Int64Array, samples_per_shard: int, keep_images: bool
    ) -> Iterator[Int64Array]:
        """Cuts rows of one split into shards: images that stay in a tar of others make one."""
        tar = self.changed["tar"].take(pa.array(rows)).combine_chunks().dictionary_encode()
        number = pc.fill_null(tar.indices, -1).to_numpy()
        if keep_images:
            number = np.full_like(number, -1)
        copied = rows[number < 0]
        for start in range(0, len(copied), samples_per_shard):
            yield copied[start : start + samples_per_shard]
        offsets = self.changed["image_offset"].to_numpy()[rows]
        in_order = np.lexsort((offsets, number))
        ends = np.searchsorted(number[in_order], np.arange(len(tar.dictionary) + 1))
        for start, end in pairwise(ends.tolist()):
            if end > start:
                yield rows[in_order[start:end]]

    @property
    def num_live(self) -> int:
        """The samples of the dataset before anything is done."""
        return int(self.held.filter(pc.equal(self.held["state"], LIVE)).num_rows)

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


class SharedKeyError(Exception):
    """A listed key is also that of a record in a tar that was left unopened."""


def plan_ingest(source: Source, manifest: Manifest, unopened: Sequence[str] = ()) -> IngestPlan:
    """Compares a source's listing with a manifest.

    The second and later records of a key become `duplicate-id` rejects under keys of their own.
    What the manifest has of `unopened` tars, by their names, counts as listed and unchanged; a
    record that shares its key with one of those raises SharedKeyError, since which of them is
    the first cannot be told. Raises SourceError if nothing is listed: an empty listing would
    remove every sample.
    """
    rows = manifest.rows(
        ["key", "split", "state", "reason", "detail", "fingerprint", "tar", "duplicate_of"]
    )
    rows = rows.filter(pc.not_equal(rows["state"], REMOVED)).combine_chunks()
    known, seen, renamed = _Known(rows), _Seen(), _Renamed()
    is_unopened = np.asarray(pc.is_in(rows["tar"], pa.array(unopened, pa.string())))
    is_copy = np.asarray(pc.is_valid(rows["duplicate_of"]))
    copies = [CHANGED.empty_table()]
    changed, settled = [CHANGED.empty_table()], [SAMPLES.empty_table()]
    listed, unchanged = np.tile(is_unopened, (2, 1))
    is_live = np.asarray(pc.equal(rows["state"], LIVE))
    lost = [_LOST.empty_table()]
    num_listed, num_changed = int(np.count_nonzero(is_unopened)), 0
    entries = iter(source.records())
    while chunk := list(islice(entries, _LISTING_CHUNK)):
        hashes = seen.rename_copies(chunk)
        row = known.find(hashes)
        for i in np.flatnonzero(row < 0).tolist():
            check_key(chunk[i].key)
        if is_unopened[row[row >= 0]].any():
            raise SharedKeyError
        same = known.says(row, chunk)
        renamed.add(row, same, chunk)
        listed[row[row >= 0]] = True
        unchanged[row[same]] = True
        fresh = [chunk[i] for i in np.flatnonzero(~same).tolist()]
        changed.append(_to_write([entry for entry in fresh if isinstance(entry, Record)]))
        if same.any() and is_copy[row[same]].any():
            unmoved = [chunk[i] for i in np.flatnonzero(same) if is_copy[row[i]]]
            copies.append(_to_write([entry for entry in unmoved if isinstance(entry, Record)]))
        rejects = _rejected([entry for entry in fresh if isinstance(entry, Reject)])
        settled.append(rejects)
        if rejects.num_rows and is_live.any():
            changed_rows = row[(row >= 0) & ~same]
            samples = rows["key"].take(pa.array(changed_rows[is_live[changed_rows]]))
            lost.append(_of_keys(rejects, samples).select(_LOST.names))
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
    vanished = removed.filter(pc.equal(removed["state"], LIVE))["key"]
    lost.append(pa.table([vanished, pa.repeat("", len(vanished))], _LOST))
    old_rejects = rows.filter(pc.and_(pa.array(unchanged), pc.equal(rows["state"], REJECT)))
    to_write = pa.concat_tables(changed)
    to_write = to_write.take(np.argsort(_column_hashes(to_write["key"]), kind="stable"))
    num_edited = int(np.count_nonzero(listed & ~unchanged))
    why = ["reason", "detail"]
    return IngestPlan(
        manifest=manifest,
        changed=to_write,
        known=_live_rows(manifest, to_write["key"]),
        settled=pa.concat_tables([*settled, _removals(removed), renamed.rows(manifest, rows)]),
        rejects=pa.concat_tables([table.select(why) for table in (*settled, old_rejects)]),
        held=rows.select(["state", "reason"]),
        lost=pa.concat_tables(lost),
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
        if (row < 0).all():
            return np.zeros(len(row), bool)
        here = pa.array(row, mask=row < 0)
        there = self._identity.take(here)
        split = pa.array([entry.split for entry in entries], pa.string())
        fingerprint = pa.array([_fingerprint(entry) for entry in entries], pa.string())
        same = pc.and_(pc.equal(there["split"], split), pc.equal(there["fingerprint"], fingerprint))
        found: BoolArray = pc.fill_null(same, False).to_numpy()
        return found


class _Renamed:
    """Unchanged records in tars that are listed by other settings now, or with other records."""

    def __init__(self) -> None:
        self._row: list[Int64Array] = []
        self._tar: list[str] = []

    def add(self, row: Int64Array, same: BoolArray, entries: Sequence[Record | Reject]) -> None:
        """Notes those of the entries that say the `same` as their `row`, but for their tar."""
        if any(entry.tar for entry in entries):
            self._row.append(row[same])
            self._tar += [entries[i].tar for i in np.flatnonzero(same).tolist()]

    def rows(self, manifest: Manifest, known: pa.Table) -> pa.Table:
        """Returns their rows with the tars' new names, given the rows they were compared with."""
        row = np.concatenate([np.empty(0, np.int64), *self._row])
        tar = pa.array(self._tar, pa.string())
        other = pc.fill_null(pc.not_equal(known["tar"].take(pa.array(row)), tar), True)
        if not pc.any(other).as_py():
            return SAMPLES.empty_table()
        keys = known["key"].take(pa.array(row)).filter(other).combine_chunks()
        names = tar.filter(other.combine_chunks())
        held = manifest.rows()
        place = pc.index_in(held["key"], value_set=keys)
        held, place = held.filter(pc.is_valid(place)), place.drop_null()
        column = held.schema.get_field_index("tar")
        return held.set_column(column, "tar", names.take(place.combine_chunks()))


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
        return Reject(key, entry.split, "duplicate-id", detail, entry.fingerprint, tar=entry.tar)

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
            "tar": [record.tar or None for record in records],
            "image_offset": [record.image_offset for record in records],
            "image_size": [record.image_size for record in records],
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
        tar=[reject.tar or None for reject in rejects],
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


def _rows(**columns: Sequence[str | None] | pa.ChunkedArray) -> pa.Table:
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
