"""Compares a source's listing with a manifest: what is to be written, removed or left alone.

No image is opened here. A record is left alone when the manifest has its split and fingerprint,
whether it became a sample or a reject.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline.data.image_check import Verify
from pipeline.data.manifest import REJECT, REMOVED, SAMPLES, Manifest
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
    ]
)


@dataclass(frozen=True)
class ShardPlan:
    """The records that go into one shard: a plain message to whoever writes it."""

    url: str
    split: str
    records: pa.Table  # schema CHANGED, in the shard's order
    known: pa.Table  # schema SAMPLES: the live rows that some of them had until now
    keep_images: bool  # only texts changed: the shard holds no images, the old rows say where
    verify: Verify


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

    def shards(self, samples_per_shard: int, verify: Verify) -> Iterator[ShardPlan]:
        """Cuts the changed records into shards: of one split, with images or without."""
        old_row = pc.index_in(self.changed["key"], value_set=self.known["key"].combine_chunks())
        old_row = pc.fill_null(old_row, -1).to_numpy()
        keeps_image = np.zeros(self.changed.num_rows, bool)
        edited = np.flatnonzero(old_row >= 0)
        keeps_image[edited] = _same_images(
            self.changed.take(edited), self.known.take(old_row[edited])
        )
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
                        verify=verify,
                    )


def plan_ingest(source: Source, manifest: Manifest) -> IngestPlan:
    """Compares a source's listing with a manifest.

    The second and later records of a key become `duplicate-id` rejects under keys of their own.
    Raises SourceError if nothing is listed: an empty listing would remove every sample.
    """
    rows = manifest.rows(["key", "split", "state", "reason", "detail", "fingerprint"])
    rows = rows.filter(pc.not_equal(rows["state"], REMOVED))
    index = _Index(rows)
    changed, settled = [CHANGED.empty_table()], [SAMPLES.empty_table()]
    listed, unchanged = np.zeros((2, rows.num_rows), bool)
    num_listed = num_changed = 0
    entries = _unique(source.records())
    while chunk := list(islice(entries, _LISTING_CHUNK)):
        row, same = index.find(chunk)
        listed[row[row >= 0]] = True
        unchanged[row[same]] = True
        fresh = [chunk[i] for i in np.flatnonzero(~same)]
        changed.append(_to_write([entry for entry in fresh if isinstance(entry, Record)]))
        settled.append(_rejected([entry for entry in fresh if isinstance(entry, Reject)]))
        num_listed += len(chunk)
        num_changed += len(fresh)
    if not num_listed:
        raise SourceError(
            f"{manifest.url}: the source lists no record at all; nothing was changed, because "
            "an empty listing would remove every sample"
        )
    removed = rows.filter(pa.array(~listed))
    old_rejects = rows.filter(pc.and_(pa.array(unchanged), pc.equal(rows["state"], REJECT)))
    to_write = pa.concat_tables(changed)
    to_write = to_write.take(np.argsort(_hashes(to_write["key"].to_pylist()), kind="stable"))
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


class _Index:
    """Finds a record's row by hashes of 64 bits, which a hundred million keys may share safely."""

    def __init__(self, rows: pa.Table) -> None:
        keys = _hashes(rows["key"].to_pylist())
        self._row = np.argsort(keys)
        self._keys = keys[self._row]
        identity = rows.select(["split", "fingerprint"]).to_pydict()
        self._stamps = _hashes(map(_stamp, identity["split"], identity["fingerprint"]))

    def find(
        self, entries: Sequence[Record | Reject]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Returns each entry's row, -1 if it has none, and whether that row is what it says."""
        if not len(self._keys):
            return np.full(len(entries), -1), np.zeros(len(entries), bool)
        keys = _hashes(entry.key for entry in entries)
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        row = np.where(self._keys[place] == keys, self._row[place], -1)
        stamps = _hashes(_stamp(entry.split, _fingerprint(entry)) for entry in entries)
        return row, (row >= 0) & (self._stamps[row] == stamps)


def _unique(entries: Iterable[Record | Reject]) -> Iterator[Record | Reject]:
    """Gives the second and later entries of a key a key of their own, as rejects."""
    seen: set[int] = set()
    copies: Counter[str] = Counter()
    for entry in entries:
        check_key(entry.key)
        hashed = xxhash.xxh3_64_intdigest(entry.key.encode())
        if hashed in seen:
            key = entry.key
            while hashed in seen:
                copies[entry.key] += 1
                key = safe_key(f"{entry.key}-duplicate-{copies[entry.key] + 1}")
                hashed = xxhash.xxh3_64_intdigest(key.encode())
            detail = f"key {entry.key} is listed more than once; its first record holds"
            entry = Reject(key, entry.split, "duplicate-id", detail, entry.fingerprint)
        seen.add(hashed)
        yield entry


def _fingerprint(entry: Record | Reject) -> str:
    """A listed reject's starts with the reason: the same files may be judged anew one day."""
    if isinstance(entry, Reject):
        return f"{entry.reason}:{entry.fingerprint}"
    return entry.fingerprint


def _stamp(split: str, fingerprint: str) -> str:
    return f"{split}\0{fingerprint}"


def _hashes(texts: Iterable[str]) -> npt.NDArray[np.uint64]:
    return np.fromiter((xxhash.xxh3_64_intdigest(text.encode()) for text in texts), np.uint64)


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
