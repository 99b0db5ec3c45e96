"""The ingest plan: what is to be written, removed or left alone.

No image is opened here. A record is left alone when the manifest has its split and fingerprint,
whether it became a sample or a reject; but a copy of an image is looked at again when the sample
that it was a copy of is no longer there as it was. The records of a tar that was not even opened,
because the manifest has them all, are left alone together.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import islice, pairwise

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline.data.ingest.treatment import Treatment
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import (
    SAMPLES,
    Int64Array,
    SampleRow,
    State,
    arrow_schema,
    foreign_tars,
    judgements,
    to_table,
)
from pipeline.data.sample import check_key, safe_key
from pipeline.data.sources.base import Record, Reject, Source
from pipeline.data.tars.foreign_tar import ForeignTar
from pipeline.errors import SourceError
from pipeline.reason import Reason

_IDENTITY = ("split", "image_fingerprint", "texts_fingerprint")
_COMPARED = ("key", *_IDENTITY, "state", "reason", "detail", "suffix", "tar", "duplicate_of")
_LISTING_CHUNK = 8192  # records compared with the manifest at once

# Records to be written. Tables, because a listing of millions would not fit as Python objects.
CHANGED = arrow_schema(Record)

# What a sample's image is recognised by, should another be a copy of it.
HOLDERS = pa.schema([SAMPLES.field(name) for name in ("key", "source_digest", "perceptual_hash")])

_IMAGE_COLUMNS = ("split", "suffix", "image_fingerprint")  # an image can stay if these are the same

_LOST = pa.schema([("key", pa.string()), ("reason", pa.string())])

Hashes = npt.NDArray[np.uint64]
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
        tars, number = foreign_tars(self.changed["tar"].take(pa.array(rows)))
        if keep_images:
            number = np.full_like(number, -1)
        copied = rows[number < 0]
        for start in range(0, len(copied), samples_per_shard):
            yield copied[start : start + samples_per_shard]
        offsets = self.changed["image_offset"].fill_null(-1).to_numpy()[rows]
        in_order = np.lexsort((offsets, number))
        ends = np.searchsorted(number[in_order], np.arange(len(tars) + 1))
        for start, end in pairwise(ends.tolist()):
            if end > start:
                yield rows[in_order[start:end]]

    @property
    def num_live(self) -> int:
        """The samples of the dataset before anything is done."""
        return int(self.held.filter(pc.equal(self.held["state"], State.LIVE)).num_rows)

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
        old = self.known.select(_IMAGE_COLUMNS).take(old_row)  # null where there is none
        same = [pc.equal(self.changed[name], old[name]) for name in _IMAGE_COLUMNS]
        keeps_image = pc.fill_null(reduce(pc.and_kleene, same), False).to_numpy()
        return pc.fill_null(old_row, -1).to_numpy(), keeps_image


class SharedKeyError(Exception):
    """A listed key is also that of a record in a tar that was left unopened."""


def plan_ingest(
    source: Source, manifest: Manifest, unopened: Collection[ForeignTar] = ()
) -> IngestPlan:
    """Compares a source's listing with a manifest.

    The second and later records of a key become `duplicate-id` rejects under keys of their own.
    What the manifest has of `unopened` tars counts as listed and unchanged; a
    record that shares its key with one of those raises SharedKeyError, since which of them is
    the first cannot be told. Raises SourceError if nothing is listed: an empty listing would
    remove every sample.
    """
    rows = manifest.rows(_COMPARED)
    rows = rows.filter(pc.not_equal(rows["state"], State.REMOVED)).combine_chunks()
    tars, tar_of_row = foreign_tars(rows["tar"])
    known, seen, renamed = _Known(rows), _Seen(), _Renamed(tars, tar_of_row)
    is_unopened = np.isin(tar_of_row, [i for i, tar in enumerate(tars) if tar in unopened])
    is_copy = np.asarray(pc.is_valid(rows["duplicate_of"]))
    copies = [CHANGED.empty_table()]
    changed, settled = [CHANGED.empty_table()], [SAMPLES.empty_table()]
    listed, unchanged = np.tile(is_unopened, (2, 1))
    is_live = np.asarray(pc.equal(rows["state"], State.LIVE))
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
        changed.append(_records(fresh))
        if same.any() and is_copy[row[same]].any():
            copies.append(_records([chunk[i] for i in np.flatnonzero(same) if is_copy[row[i]]]))
        rejects = _rejects(fresh)
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
    vanished = removed.filter(pc.equal(removed["state"], State.LIVE))["key"]
    lost.append(pa.table([vanished, pa.repeat("", len(vanished))], _LOST))
    old_rejects = rows.filter(pc.and_(pa.array(unchanged), pc.equal(rows["state"], State.REJECT)))
    to_write = pa.concat_tables(changed)
    to_write = to_write.take(np.argsort(_column_hashes(to_write["key"]), kind="stable"))
    settled += [_removals(removed), renamed.rows(manifest, rows["key"])]
    num_edited = int(np.count_nonzero(listed & ~unchanged))
    why = ["reason", "detail"]
    return IngestPlan(
        manifest=manifest,
        changed=to_write,
        known=_live_rows(manifest, to_write["key"]),
        settled=pa.concat_tables(settled),
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
        live = np.asarray(pc.equal(rows["state"], State.LIVE)) & stays
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
        self._identity = rows.select(_IDENTITY).append_column("judgement", judgements(rows))

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
        there = self._identity.take(pa.array(row, mask=row < 0))
        here = {
            "split": [entry.split for entry in entries],
            "image_fingerprint": [entry.image_fingerprint for entry in entries],
            "texts_fingerprint": [entry.texts_fingerprint for entry in entries],
            "judgement": [_judgement(entry) for entry in entries],
        }
        same = [pc.equal(there[name], pa.array(here[name], pa.string())) for name in here]
        found: BoolArray = pc.fill_null(reduce(pc.and_kleene, same), False).to_numpy()
        return found


class _Renamed:
    """Unchanged records in tars that are listed by other settings now, or with other records."""

    def __init__(self, tars: Sequence[ForeignTar], tar_of_row: Int64Array) -> None:
        self._known = [*tars, None]  # -1: a row has none
        self._tar_of_row = tar_of_row
        self._rows: list[int] = []
        self._tars: list[ForeignTar | None] = []

    def add(self, row: Int64Array, same: BoolArray, entries: Sequence[Record | Reject]) -> None:
        """Notes those of the entries that say the `same` as their `row`, but for their tar."""
        if not any(entry.tar for entry in entries):
            return
        for i in np.flatnonzero(same).tolist():
            if entries[i].tar != self._known[self._tar_of_row[row[i]]]:
                self._rows.append(row[i])
                self._tars.append(entries[i].tar)

    def rows(self, manifest: Manifest, known: pa.ChunkedArray) -> pa.Table:
        """Returns their rows with the tars they are in now, given the keys of what they said."""
        if not self._rows:
            return SAMPLES.empty_table()
        held = manifest.rows()
        keys = known.take(pa.array(self._rows)).combine_chunks()
        place = pc.index_in(held["key"], value_set=keys)
        held, place = held.filter(pc.is_valid(place)), place.drop_null()
        tars = msgspec.to_builtins(self._tars)
        column = held.schema.get_field_index("tar")
        tar = pa.array(tars, SAMPLES.field("tar").type).take(place.combine_chunks())
        return held.set_column(column, "tar", tar)


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
        return Reject(
            key,
            entry.split,
            Reason.DUPLICATE_ID,
            detail,
            entry.image_fingerprint,
            entry.texts_fingerprint,
            tar=entry.tar,
        )

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


def _judgement(entry: Record | Reject) -> str:
    """As `judgements` of rows."""
    return entry.reason if isinstance(entry, Reject) else ""


def _hashes(texts: Iterable[str]) -> Hashes:
    return np.fromiter(map(xxhash.xxh3_64_intdigest, map(str.encode, texts)), np.uint64)


def _column_hashes(column: pa.ChunkedArray) -> Hashes:
    """As `_hashes`, with few of a column's strings in Python at a time."""
    parts = range(0, len(column), _LISTING_CHUNK)
    hashes = [_hashes(column.slice(start, _LISTING_CHUNK).to_pylist()) for start in parts]
    return np.concatenate([np.empty(0, np.uint64), *hashes])


def _records(entries: Sequence[Record | Reject]) -> pa.Table:
    """Returns the records among what is listed; schema CHANGED."""
    return to_table([entry for entry in entries if isinstance(entry, Record)], Record)


def _rejects(entries: Sequence[Record | Reject]) -> pa.Table:
    """Returns the rows of the rejects among what is listed; schema SAMPLES."""
    rows = [
        SampleRow(
            key=entry.key,
            split=entry.split,
            state=State.REJECT,
            reason=entry.reason,
            detail=entry.detail,
            image_fingerprint=entry.image_fingerprint,
            texts_fingerprint=entry.texts_fingerprint,
            tar=entry.tar,
        )
        for entry in entries
        if isinstance(entry, Reject)
    ]
    return to_table(rows, SampleRow)


def _removals(rows: pa.Table) -> pa.Table:
    """Returns rows that say of their keys that they are listed no more."""
    state = pa.repeat(State.REMOVED.value, rows.num_rows)
    known = rows.select(["key", *_IDENTITY]).append_column("state", state)
    columns = {column.name: pa.nulls(rows.num_rows, column.type) for column in SAMPLES}
    return pa.table(columns | {name: known[name] for name in known.column_names}, SAMPLES)


def _live_rows(manifest: Manifest, keys: pa.ChunkedArray) -> pa.Table:
    if not len(keys) or not manifest.version:  # the first ingest has nothing to look up
        return SAMPLES.empty_table()
    rows = manifest.samples()
    return rows.filter(pc.is_in(rows["key"], value_set=keys.combine_chunks()))
