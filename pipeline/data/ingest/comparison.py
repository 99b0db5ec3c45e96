"""The comparison of a listing with a manifest: a join by key, in the engine's bounded memory.

What is compared of the listing and of the manifest are two tables of the engine, which lie on the
disk beyond its bound. The rest of the listing is in a spool, from which what differs is taken.
"""

from collections import Counter
from collections.abc import Collection, Iterator

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.ingest.listing_spool import ListingSpool
from pipeline.data.manifest.engine import Engine
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import SAMPLES
from pipeline.data.sample import check_key, safe_key
from pipeline.data.sources.columns import LISTED
from pipeline.data.tars.foreign_tar import ForeignTar

_IDENTITY = ("split", "image_fingerprint", "texts_fingerprint")
_COMPARED = ("key", *_IDENTITY, "state", "reason", "detail", "suffix", "tar", "duplicate_of")

# What has become of each record; of a reject also why. `identity` tells whether a record says the
# same: of a reject that was listed as one, which has no suffix, the reason is a part of that.
_KNOWN = """
CREATE TEMP TABLE known AS SELECT
    key,
    hash(split, image_fingerprint, texts_fingerprint,
        if(state = 'reject' AND suffix IS NULL, reason, '')) AS identity,
    hash(tar) AS tar,
    state = 'live' AS is_live,
    if(state = 'reject', reason, NULL) AS reason,
    if(state = 'reject', detail, NULL) AS detail,
    duplicate_of,
    coalesce(tar IN (SELECT tar FROM unopened), false) AS is_unopened
FROM rows WHERE state <> 'removed'
"""

# Of every listed record: as much as is compared. The rest is in the spool.
_LISTED = """
SELECT number, key, reason, hash(tar) AS tar,
    hash(split, image_fingerprint, texts_fingerprint, coalesce(reason, '')) AS identity
FROM batch
"""

# The records that differ, or may do so: `copy` is one whose image is a copy of another's.
_DIFFERENT = """
CREATE TEMP TABLE different AS SELECT
    listed.number,
    coalesce(listed.key, known.key) AS key,
    listed.number IS NOT NULL AS is_listed,
    listed.reason AS reason,
    known.key IS NOT NULL AS is_known,
    coalesce(known.is_live, false) AS was_live,
    coalesce(listed.identity = known.identity, false) AS is_same,
    known.duplicate_of,
    coalesce(listed.tar <> known.tar, false) AS is_moved,
    coalesce(known.is_unopened, false) AS is_unopened
FROM listing AS listed FULL JOIN known ON listed.key = known.key
WHERE CASE
    WHEN listed.number IS NULL THEN NOT known.is_unopened
    WHEN known.key IS NULL THEN true
    ELSE listed.identity <> known.identity OR listed.tar <> known.tar OR known.is_unopened
        OR known.duplicate_of IS NOT NULL
END
"""

# Copies that stay as they are, of a sample that does not.
_FREED = """
CREATE TEMP TABLE freed AS WITH
copy AS (
    SELECT number, key, duplicate_of FROM different WHERE is_same AND duplicate_of IS NOT NULL
),
staying AS (
    SELECT key FROM known WHERE is_live AND key IN (SELECT duplicate_of FROM copy)
    AND key NOT IN (SELECT key FROM different WHERE NOT is_same)
)
SELECT number, key FROM copy WHERE duplicate_of NOT IN (FROM staying)
"""


class SharedKeyError(Exception):
    """A listed key is also that of a record in a tar that was left unopened."""


class Comparison:
    """What a listing says beside a manifest; `unopened` tars' records count as listed there."""

    def __init__(
        self,
        engine: Engine,
        spool: ListingSpool,
        manifest: Manifest,
        batches: Iterator[pa.RecordBatch],
        unopened: Collection[ForeignTar] = (),
    ) -> None:
        """Goes through the listing; nothing but a few numbers of it stays in memory.

        The second and later records of a key are listed as `duplicate-id` rejects under keys of
        their own, which no other record has. Raises SharedKeyError if a listed key is that of a
        record in an unopened tar, and ShardError of a new key that can be none.
        """
        self._engine = engine
        self._spool = spool
        manifest.register(engine, "rows", _COMPARED)
        tars = pa.array(msgspec.to_builtins([*unopened]), LISTED.field("tar").type)
        engine.register("unopened", pa.table({"tar": tars}))
        engine.run(_KNOWN)
        self._list(batches)
        self.num_listed = spool.num_listed
        self.num_unopened: int = engine.value("SELECT count(*) FROM known WHERE is_unopened")
        self._rename_copies()
        engine.run(_DIFFERENT)
        if self._count("different", "is_listed AND is_unopened"):
            raise SharedKeyError
        new = "SELECT min(key) FROM different WHERE NOT is_known AND NOT regexp_full_match(key, ?)"
        unsafe = engine.value(new, ["[A-Za-z0-9_-]{1,80}"])
        if unsafe is not None:
            check_key(unsafe)
        engine.run(_FREED)

    def _list(self, batches: Iterator[pa.RecordBatch]) -> None:
        compared = ["key", *_IDENTITY, "reason", "tar"]
        self._engine.register("batch", _numbered(LISTED.empty_table(), 0))
        self._engine.run(f"CREATE TEMP TABLE listing AS {_LISTED}")
        for batch in batches:
            rows = pa.Table.from_batches([batch.select(compared)])
            self._engine.register("batch", _numbered(rows, self._spool.num_listed))
            self._engine.run(f"INSERT INTO listing {_LISTED}")
            self._spool.add(batch)
        self._spool.finish()

    def _rename_copies(self) -> None:
        self._engine.run(
            "CREATE TEMP TABLE copies AS WITH repeated AS "
            "(SELECT key FROM listing GROUP BY key HAVING count(*) > 1) "
            "SELECT number, key FROM listing WHERE key IN (FROM repeated) "
            "QUALIFY row_number() OVER (PARTITION BY key ORDER BY number) > 1"
        )
        copies = self._engine.table("SELECT number, key FROM copies ORDER BY number")
        if not copies.num_rows:
            return
        keys = copies["key"].to_pylist()
        names = self._free_names(Counter(keys))
        records = self._spool.take(copies["number"].to_numpy())
        renamed = records.select(_IDENTITY).append_column("number", copies["number"])
        renamed = renamed.append_column("name", pa.array([next(names[key]) for key in keys]))
        self._engine.register("renamed", renamed)
        self._engine.run(
            "UPDATE listing SET key = name, reason = 'duplicate-id', identity = "
            "hash(split, image_fingerprint, texts_fingerprint, 'duplicate-id') "
            "FROM renamed WHERE listing.number = renamed.number"
        )

    def _free_names(self, wanted: Counter[str]) -> dict[str, Iterator[str]]:
        """Returns names for copies of keys, as many as there are, that no record has."""
        found: dict[str, list[str]] = {key: [] for key in wanted}
        last = dict.fromkeys(wanted, 1)
        while missing := {key: n for key in wanted if (n := wanted[key] - len(found[key]))}:
            candidates = {
                safe_key(f"{key}-duplicate-{last[key] + i}"): key
                for key, number in missing.items()
                for i in range(1, number + 1)
            }
            self._engine.register("candidates", pa.table({"key": [*candidates]}))
            taken = self._engine.table("SELECT key FROM listing WHERE key IN (FROM candidates)")
            for name in taken["key"].to_pylist():
                candidates.pop(name, None)
            for name, key in candidates.items():
                found[key].append(name)
            for key, number in missing.items():
                last[key] += number
        return {key: iter(names) for key, names in found.items()}

    def changed(self) -> pa.Table:
        """Returns the records that are to be written, in no promised order; schema LISTED."""
        return self._listed(
            "(NOT is_same AND reason IS NULL) OR number IN (SELECT number FROM freed)"
        )

    def rejects(self) -> pa.Table:
        """Returns the rejects that the manifest has not, or not so; schema LISTED."""
        return self._listed("NOT is_same AND reason IS NOT NULL")

    def moved(self) -> pa.Table:
        """Returns key and tar of unchanged records in tars that are listed otherwise now."""
        return self._listed("is_same AND is_moved").select(["key", "tar"])

    def _listed(self, condition: str) -> pa.Table:
        found = self._engine.table(
            "SELECT number, key, reason FROM different "
            f"WHERE is_listed AND ({condition}) ORDER BY number"
        )
        records = self._spool.take(found["number"].to_numpy())
        is_copy = pc.fill_null(pc.not_equal(records["key"], found["key"]), False)
        detail = pc.binary_join_element_wise(
            "key ", records["key"], " is listed more than once; its first record holds", ""
        )
        columns = {
            "key": found["key"],
            "reason": found["reason"],
            "detail": pc.if_else(is_copy, detail, records["detail"]),
        }
        return pa.table([columns.get(name, records[name]) for name in LISTED.names], schema=LISTED)

    def removed(self) -> pa.Table:
        """Returns key, split and fingerprints of what is listed no more."""
        columns = ["key", *_IDENTITY]
        if not self.num_removed:  # a second reading of the manifest
            return SAMPLES.empty_table().select(columns)
        return self._engine.table(
            f"SELECT {', '.join(columns)} FROM rows "
            "WHERE key IN (SELECT key FROM different WHERE NOT is_listed)"
        )

    def lost(self) -> pa.Table:
        """Returns key and reason of live samples that are rejects now, or, "", listed no more."""
        return self._engine.table(
            "SELECT key, coalesce(reason, '') AS reason FROM different "
            "WHERE was_live AND (NOT is_listed OR (NOT is_same AND reason IS NOT NULL))"
        )

    def edited_samples(self) -> pa.Table:
        """Returns the keys of live samples whose records are to be written anew."""
        return self._engine.table(
            "SELECT key FROM different "
            "WHERE is_listed AND was_live AND NOT is_same AND reason IS NULL"
        )

    def unchanged_rejects(self) -> pa.Table:
        """Returns reason, count and an example's detail of the rejects that stay as they are."""
        return self._engine.table(
            "SELECT reason, count(*) AS count, min(detail) AS detail FROM known "
            "WHERE reason IS NOT NULL AND key NOT IN "
            "(SELECT key FROM different WHERE NOT is_same UNION ALL SELECT key FROM freed) "
            "GROUP BY reason"
        )

    def held(self) -> pa.Table:
        """Returns how many rows the manifest has, by reason; null of live samples."""
        return self._engine.table("SELECT reason, count(*) AS count FROM known GROUP BY reason")

    @property
    def num_removed(self) -> int:
        return self._count("different", "NOT is_listed")

    @property
    def num_edited(self) -> int:
        return self._count("different", "is_listed AND is_known AND NOT is_same") + self._count(
            "freed"
        )

    @property
    def num_added(self) -> int:
        return self._count("different", "is_listed AND NOT is_known")

    def _count(self, table: str, condition: str = "true") -> int:
        found: int = self._engine.value(f"SELECT count(*) FROM {table} WHERE {condition}")
        return found


def _numbered(rows: pa.Table, first: int) -> pa.Table:
    return rows.append_column("number", pa.array(np.arange(first, first + rows.num_rows)))
