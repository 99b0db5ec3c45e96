"""The manifest: which samples of a dataset exist, where in which shard, and why others do not.

It is two kinds of Delta table under `DATASET/manifest`: `samples`, and one for each extractor
under `features/<extractor>`. Rows are only ever appended; the newest row of a key is what holds.
A commit is an exact compare-and-set: it makes the version after the one it was prepared for, or
it is prepared again on top of what others committed meanwhile. Readers see the table before or
after, never between, and an old version stays readable until `compact` drops it.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from deltalake import CommitProperties, DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from pipeline import storage
from pipeline.data.manifest import schema
from pipeline.data.manifest.earlier_form import earlier_features
from pipeline.data.manifest.engine import Engine, Scan
from pipeline.errors import ManifestError, StorageError

LIVE, REJECT, REMOVED = "live", "reject", "removed"

SAMPLES = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("state", pa.string()),  # live, reject or removed
        ("reason", pa.string()),  # of a reject: a short slug
        ("detail", pa.string()),  # of a reject: the fault; of a live sample: what was left out
        ("fingerprint", pa.string()),  # the source's, when the record was last read
        ("digest", pa.string()),  # xxh3_128 of the image's bytes, in hex
        ("shard", pa.string()),  # the name of the tar that holds the image, without .tar
        # Of an image that was left in somebody else's tar: that one, as `ForeignTar.name`; the
        # shard refers to it, and offset and size are those in the foreign tar.
        ("tar", pa.string()),
        ("suffix", pa.string()),  # of the image part
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("texts_shard", pa.string()),  # the name of the tar that holds the texts
        ("texts_offset", pa.int64()),
        ("texts_size", pa.int64()),
        ("num_captions", pa.int32()),
        ("num_questions", pa.int32()),
        ("num_rounds", pa.int32()),
        ("width", pa.int32()),  # pixels
        ("height", pa.int32()),
        # Of the file the image was made of, where it was encoded anew; as `digest`.
        ("source_digest", pa.string()),
        # Where near duplicates are filtered: 64 bits, as a signed number.
        ("perceptual_hash", pa.int64()),
        ("duplicate_of", pa.string()),  # of a reject for that reason: the key of the live sample
        ("sequence", pa.int64()),  # the version whose commit wrote the row
    ]
)

# A live sample may lack these.
OPTIONAL_COLUMNS = frozenset({"tar", "source_digest", "perceptual_hash", "duplicate_of"})

FEATURES = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),  # of the image, and so of the sidecar; without .tar
        ("values_offset", pa.int64()),  # of the .npy payload, its header included
        ("values_size", pa.int64()),
        ("boxes_offset", pa.int64()),  # -1 where the extractor's card implies the boxes
        ("boxes_size", pa.int64()),
        ("num_regions", pa.int32()),
        # Of an image that the extractor could make nothing of; null where there is a feature.
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("sequence", pa.int64()),
    ]
)

# What delta-rs 1.6.6 undoes, cuts off or dies of; \ud800 and on are bytes that are not UTF-8.
_ODD_IN_PATHS = re.compile(r"[%\[\]\\|^\x00-\x1f\x7f\ud800-\udfff]")
_ODD_IN_URLS = re.compile(r"[%\[\]\\|^#?\x00-\x1f\x7f\ud800-\udfff]|//")

# Columns that tables of earlier versions lack: null there.
_ADDED_COLUMNS = frozenset({"reason", "detail"})

# Delta's own retries would put our commit after any other that does not conflict in its eyes: an
# append after every append, a second creation after the first.
_NO_RETRIES = CommitProperties(max_commit_retries=0)
_ORIGIN = "sightlineOrigin"  # among the properties of a commit
# A table is written anew when it is in more files than this, or more of its rows are superseded.
_MAX_FILES = 16
_MAX_SUPERSEDED = 0.1


@dataclass(frozen=True)
class Version:
    """One commit of a manifest."""

    version: int
    time: datetime
    operation: str
    replaced: bool = False  # whether it replaced the rows before it rather than add some


@dataclass(frozen=True)
class Kept:
    """The versions that `compact` has promised to keep; the others may be gone."""

    first: int  # this one and all after it
    named: frozenset[int] = frozenset()  # older ones

    def __contains__(self, version: object) -> bool:
        return version in self.named or (isinstance(version, int) and version >= self.first)

    def __str__(self) -> str:
        return ", ".join([*map(str, sorted(self.named)), f"all from {self.first} on"])


class Manifest:
    """One version of a dataset's manifest. `url` is the dataset's, not the table's."""

    def __init__(self, url: str, table: "_Table") -> None:
        self.url = url
        self.version = table.version
        self._table = table

    @classmethod
    def open(cls, url: str, version: int | None = None) -> "Manifest":
        """Opens a version, or the newest.

        Raises ManifestError if the dataset has none, or this version was dropped.
        """
        if version is not None and version not in (kept := _read_kept(url)):
            raise ManifestError(
                f"{url}: version {version} was dropped by `sightline data compact`; "
                f"kept: {kept}. Open one of these, or ingest and train again"
            )
        return cls(url, _Table.open(_samples_location(url), SAMPLES, version))

    @classmethod
    def create(cls, url: str) -> "Manifest":
        """Opens the newest version, of an empty manifest made now if there was none.

        Safe when several do this at once: one of them makes it.
        """
        return cls(url, _Table.create(_samples_location(url), SAMPLES))

    @staticmethod
    def exists(url: str) -> bool:
        """Whether a dataset with a manifest is there."""
        return _Table.exists(_samples_location(url))

    def rows(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns the newest row of every key, removed keys included, in no promised order."""
        return self._table.newest(("key",), columns)

    def samples(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns the live samples, in no promised order."""
        return self._in_state(LIVE, columns)

    def rejects(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns the records that did not become samples, with reason and detail."""
        return self._in_state(REJECT, columns)

    def register(self, engine: Engine, name: str, columns: Sequence[str]) -> None:
        """Makes `rows` of these columns a view of the engine, which reads them as a stream."""
        self._table.register(engine, name, ("key",), columns)

    def digest(self) -> str:
        """Returns what is the same of two versions only if they have the same rows."""
        return self._table.digest()

    def rows_after(self, version: int, columns: Sequence[str]) -> pa.Table:
        """Returns all rows that were committed after a version, superseded ones included."""
        return self._table.raw(columns, version)

    def versions(self) -> list[Version]:
        """Returns the commits up to this version, newest first."""
        return self._table.versions()

    def kept(self) -> Kept:
        """Returns the versions that can be opened."""
        return _read_kept(self.url)

    def relocate(self, rows: pa.Table) -> "Manifest":
        """Appends rows that differ from the present ones in where the samples lie.

        A row is dropped if others have committed one of its key since this manifest was opened.
        Otherwise as `commit`.
        """
        return Manifest(self.url, self._table.append(rows, ("key",), _untouched))

    def shrink(self) -> "Manifest":
        """Makes a version without superseded rows and removals, if it would be much smaller."""
        return Manifest(self.url, self._table.shrink(("key",), _not_removed))

    def drop_versions(self, kept: Kept, unused: Collection[str]) -> None:
        """Forgets all versions but `kept`, and removes `unused` files of the table.

        From now on opening a dropped version raises ManifestError.
        """
        known = _read_kept(self.url)
        kept = Kept(max(kept.first, known.first), frozenset(v for v in kept.named if v in known))
        document = {"first": kept.first, "named": sorted(kept.named)}
        storage.write_bytes(_kept_location(self.url), json.dumps(document).encode())
        self._table.remove_files(unused)

    def unused_files(self, kept: Collection[int], min_age_hours: int) -> list[str]:
        """Returns the table's files that no kept version and no recent reader or writer needs."""
        return self._table.unused_files(kept, min_age_hours)

    def commit(self, rows: pa.Table, origin: str = "") -> "Manifest":
        """Appends rows (schema `SAMPLES`, `sequence` optional) and returns the new version.

        What other writers have committed since this manifest was opened stays: rows that it has
        made pointless are dropped, the rest goes on top. Pointless are a row whose key has this
        split and fingerprint by now, live or in the row's own state, and a removal of a key that
        others touched. The manifest that is returned remembers what others did, so that a chain
        of commits may be planned from its first version. Without rows nothing is committed.
        `origin` names what the rows come of: with one, nothing is put on top of the commits of
        another origin. Raises ManifestError of these, and if rows do not fit or name a key twice.
        """
        return Manifest(self.url, self._table.append(rows, ("key",), _still_needed, origin))

    def features(self, extractor: str) -> "FeatureManifest":
        """Returns the newest list of what an extractor has made; it may be empty."""
        return FeatureManifest(self.url, extractor)

    def extractors(self) -> list[str]:
        """Returns the names of the extractors that have listed features."""
        return storage.list_names(storage.join(self.url, "manifest", "features"))

    def _in_state(self, state: str, columns: Sequence[str] | None) -> pa.Table:
        names = SAMPLES.names if columns is None else list(columns)
        rows = self.rows(sorted({*names, "state"}))
        return rows.filter(pc.equal(rows["state"], state)).select(names)


class FeatureManifest:
    """The features that one extractor has made for a dataset.

    A row holds for a key in a shard, so that an older version of the dataset, whose sample lay
    in another shard, keeps the features it was trained with.
    """

    def __init__(self, url: str, extractor: str) -> None:
        self.url = url
        self.extractor = extractor

    def rows(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns the newest row of every key in every shard, in no promised order."""
        location = self._location()
        if not _Table.exists(location):
            names = FEATURES.names if columns is None else list(columns)
            return FEATURES.empty_table().select(names)
        return _Table.open(location, FEATURES).newest(("key", "shard"), columns)

    def register(self, engine: Engine, name: str, columns: Sequence[str]) -> None:
        """Makes `rows` a view of the engine, with these of the columns that features have."""
        location = self._location()
        if not _Table.exists(location):
            engine.register(name, schema.FEATURES.empty_table().select(list(columns)))
            return
        table = _Table.open(location, FEATURES)
        form = earlier_features(self.url, self.extractor)

        def scan(names: Sequence[str]) -> Scan:
            fields = pa.schema([schema.FEATURES.field(name) for name in names])

            def batches() -> Iterator[pa.RecordBatch]:
                for batch in table._scan(sorted(form.columns_of(names))):
                    yield from form.converted(pa.table(batch), fields).to_batches()

            return Scan(lambda: pa.RecordBatchReader.from_batches(fields, batches()))

        engine.register_newest(name, scan, ("key", "shard"), columns)

    def digest(self) -> str:
        """Returns what is the same at two times only if the rows are the same."""
        location = self._location()
        if not _Table.exists(location):
            return "none"
        return _Table.open(location, FEATURES).digest()

    def rejects(self) -> pa.Table:
        """Returns key, shard, reason and detail of the images without a feature."""
        rows = self.rows(["key", "shard", "reason", "detail"])
        return rows.filter(pc.is_valid(rows["reason"]))

    def shards(self) -> set[str]:
        """Returns the names of the shards whose features are listed."""
        return set(self.rows(["shard"])["shard"].unique().to_pylist())

    def commit(self, rows: pa.Table) -> int:
        """Lists features (schema `FEATURES`, `sequence` optional); returns the table's version.

        If another writer listed some of them meanwhile, theirs hold: a feature is a function
        of the image and the extractor, so both made the same.
        """
        table = _Table.create(self._location(), FEATURES)
        return table.append(rows, ("key", "shard"), _not_listed).version

    def shrink(self, needed_shards: Collection[str], since: datetime) -> None:
        """Drops superseded rows and those of other shards, but for rows committed `since` a time.

        Does nothing if the list would hardly be smaller.
        """
        location = self._location()
        if not _Table.exists(location):
            return
        table = _Table.open(location, FEATURES)
        before = max((v.version for v in table.versions() if v.time < since), default=-1)
        shards = pa.array(sorted(needed_shards), pa.string())

        def needed(rows: pa.Table) -> pa.Table:
            recent = pc.greater(rows["sequence"], before)
            return rows.filter(pc.or_(pc.is_in(rows["shard"], value_set=shards), recent))

        table.shrink(("key", "shard"), needed)

    def remove_unused_files(self, min_age_hours: int) -> int:
        """Removes the table's files that no recent reader or writer needs; returns how many."""
        if not _Table.exists(self._location()):
            return 0
        table = _Table.open(self._location(), FEATURES)
        unused = table.unused_files((), min_age_hours)
        table.remove_files(unused)
        return len(unused)

    def _location(self) -> str:
        return storage.join(self.url, "manifest", "features", self.extractor)


class _Table:
    """A Delta table of rows with a `sequence`, at one version.

    `others` are the rows that other writers committed between the version that was first opened
    and this one, if this one came of `append`.
    """

    def __init__(
        self, location: str, schema: pa.Schema, delta: DeltaTable, others: pa.Table | None = None
    ) -> None:
        self.location = location
        self.schema = schema
        self.version: int = delta.version()
        self._delta = delta
        self._others = schema.empty_table() if others is None else others

    @classmethod
    def open(cls, location: str, schema: pa.Schema, version: int | None = None) -> "_Table":
        options = storage.object_store_options(location)
        try:
            delta = DeltaTable(_uri(location), version=version, storage_options=options)
        except TableNotFoundError as error:
            raise ManifestError(f"{location}: no manifest here; ingest makes one") from error
        except (DeltaError, OSError) as error:
            wanted = "the manifest"
            if version is not None:
                newest = cls.open(location, schema).version
                if version > newest:
                    raise ManifestError(
                        f"{location}: there is no version {version}; the newest is {newest}"
                    ) from error
                wanted = f"version {version} of the manifest"
            raise ManifestError(
                f"{location}: {wanted} cannot be opened ({_in_one_line(error)})"
            ) from error
        found = pa.schema(delta.schema()).names
        added = _ADDED_COLUMNS if schema is FEATURES else frozenset()
        missing = set(schema.names) - set(found)
        if not missing <= added or set(found) - set(schema.names):
            raise ManifestError(
                f"{location}: the columns are not those of a manifest of this version of "
                f"Sightline: expected {', '.join(schema.names)}; found {', '.join(found)}"
            )
        return cls(location, schema, delta)

    @classmethod
    def create(cls, location: str, schema: pa.Schema) -> "_Table":
        if not cls.exists(location):
            options = storage.object_store_options(location)
            # Otherwise Delta forgets versions after 30 days, and runs name what they read.
            keep = {"delta.enableExpiredLogCleanup": "false"}
            try:
                delta = DeltaTable.create(
                    _uri(location),
                    schema,
                    configuration=keep,
                    storage_options=options,
                    commit_properties=_NO_RETRIES,
                )
                return cls(location, schema, delta)
            except (DeltaError, OSError) as error:
                if not cls.exists(location):  # else another writer made it meanwhile
                    raise ManifestError(
                        f"{location}: cannot be created ({_in_one_line(error)})"
                    ) from error
        return cls.open(location, schema)

    @staticmethod
    def exists(location: str) -> bool:
        options = storage.object_store_options(location)
        try:
            return bool(DeltaTable.is_deltatable(_uri(location), storage_options=options))
        except (DeltaError, OSError) as error:
            raise ManifestError(
                f"{location}: cannot be looked up ({_in_one_line(error)})"
            ) from error

    def newest(self, identity: Sequence[str], columns: Sequence[str] | None) -> pa.Table:
        names = self.schema.names if columns is None else list(columns)
        rows = self._read(sorted({*names, *identity, "sequence"}))
        return _newest(rows, identity).select(names)

    def digest(self) -> str:
        # A file has a name that no other ever had, and is never written again.
        names = sorted(uri.rsplit("/", 1)[-1] for uri in self._delta.file_uris())
        return xxhash.xxh3_64_hexdigest("\n".join(names).encode())

    def register(
        self, engine: Engine, name: str, identity: Sequence[str], columns: Sequence[str]
    ) -> None:
        engine.register_newest(
            name, lambda names: Scan(partial(self._scan, names)), identity, columns
        )

    def raw(self, columns: Sequence[str], after: int) -> pa.Table:
        return self._read(sorted({*columns, "sequence"}), after).select(list(columns))

    def shrink(self, identity: Sequence[str], needed: Callable[[pa.Table], pa.Table]) -> "_Table":
        """Replaces all rows by the newest ones that are `needed`, unless that saves little."""
        table = self
        while True:
            rows = table._read(self.schema.names)
            smaller = needed(_newest(rows, identity))
            few_files = len(table._delta.file_uris()) <= _MAX_FILES
            if few_files and smaller.num_rows >= (1 - _MAX_SUPERSEDED) * rows.num_rows:
                return table
            try:
                write_deltalake(
                    table._delta,
                    smaller,
                    mode="overwrite",
                    schema_mode="overwrite" if table._lacking() else None,
                    commit_properties=_NO_RETRIES,
                )
            except CommitFailedError:
                table = _Table.open(self.location, self.schema)
                continue
            except (DeltaError, OSError) as error:
                raise ManifestError(
                    f"{self.location}: cannot commit ({_in_one_line(error)})"
                ) from error
            table = _Table.open(self.location, self.schema, table.version + 1)
            table._delta.create_checkpoint()  # opens in one read instead of one a commit
            return table

    def unused_files(self, kept: Collection[int], min_age_hours: int) -> list[str]:
        # Listed by Delta, removed by us: its own removal commits two versions that change nothing.
        try:
            unused = self._delta.vacuum(
                min_age_hours,
                dry_run=True,
                enforce_retention_duration=False,
                full=True,
                keep_versions=sorted(kept) or None,
            )
        except (DeltaError, OSError) as error:
            raise ManifestError(
                f"{self.location}: cannot be listed ({_in_one_line(error)})"
            ) from error
        return sorted(storage.list_files(self.location).keys() & unused)  # some are gone already

    def remove_files(self, names: Collection[str]) -> None:
        for name in names:
            storage.remove(storage.join(self.location, name))

    def versions(self) -> list[Version]:
        return [
            Version(
                version=commit["version"],
                time=datetime.fromtimestamp(commit["timestamp"] / 1000, UTC),
                operation=commit["operation"],
                replaced=commit.get("operationParameters", {}).get("mode") == "Overwrite",
            )
            for commit in self._delta.history()
            if commit["version"] <= self.version
        ]

    def append(
        self,
        rows: pa.Table,
        identity: Sequence[str],
        needed: Callable[[pa.Table, pa.Table], pa.Table],
        origin: str = "",
    ) -> "_Table":
        """Appends the rows as the next version; see `Manifest.commit`.

        `needed(rows, newer)` returns those of our rows that are needed on top of the newest
        rows that others have committed.
        """
        table, others = self, self._others
        rows = self._fitting(rows, identity)
        if others.num_rows:
            rows = needed(rows, _newest(others, identity))
        while rows.num_rows:
            sequence = pa.repeat(pa.scalar(table.version + 1, pa.int64()), rows.num_rows)
            index = self.schema.get_field_index("sequence")
            try:
                write_deltalake(
                    table._delta,
                    rows.set_column(index, "sequence", sequence),
                    mode="append",
                    schema_mode="merge" if table._lacking() else None,
                    commit_properties=_commit_of(origin) if origin else _NO_RETRIES,
                )
            except CommitFailedError:
                latest = _Table.open(self.location, self.schema)
                latest._refuse_others(origin, table.version)
                newer = latest._read(self.schema.names, after=table.version)
                others = pa.concat_tables([others, newer])
                rows = needed(rows, _newest(others, identity))
                table = latest
            except (DeltaError, OSError) as error:
                raise ManifestError(
                    f"{self.location}: cannot commit ({_in_one_line(error)})"
                ) from error
            else:
                delta, version = table._delta, table.version + 1
                if delta.version() != version:  # others have committed since
                    delta = _Table.open(self.location, self.schema, version)._delta
                return _Table(self.location, self.schema, delta, others)
        return _Table(self.location, self.schema, table._delta, others)

    def _refuse_others(self, origin: str, after: int) -> None:
        """Raises ManifestError if a commit after a version is of another origin than ours."""
        if not origin:
            return
        for commit in self._delta.history():
            if commit["version"] > after and commit.get(_ORIGIN, origin) != origin:
                time = datetime.fromtimestamp(commit["timestamp"] / 1000, UTC)
                raise ManifestError(
                    f"{self.location}: version {commit['version']}, of {time:%Y-%m-%d %H:%M:%S} "
                    "UTC, is by another ingest, with another source or other settings, that runs "
                    "beside this one. This one stops here, so that the two do not mix: ingest into "
                    "a dataset from one source at a time, or list both under `type: merged`, or "
                    "give each a dataset.path of its own"
                )

    def _lacking(self) -> set[str]:
        """Returns the columns that were added since the table was made."""
        return set(self.schema.names) - set(pa.schema(self._delta.schema()).names)

    def _fitting(self, rows: pa.Table, identity: Sequence[str]) -> pa.Table:
        if "sequence" not in rows.column_names:
            rows = rows.append_column("sequence", pa.nulls(rows.num_rows, pa.int64()))
        try:
            rows = rows.select(self.schema.names).cast(self.schema)
        except (KeyError, pa.ArrowInvalid) as error:
            raise ManifestError(
                f"{self.location}: rows do not fit the manifest: {error}"
            ) from error
        distinct = rows.group_by(list(identity)).aggregate([]).num_rows
        if distinct != rows.num_rows:
            raise ManifestError(
                f"{self.location}: {rows.num_rows} rows to commit hold only {distinct} "
                f"different {' and '.join(identity)}"
            )
        return rows

    def _read(self, columns: Sequence[str], after: int | None = None) -> pa.Table:
        try:
            # Not to_pyarrow_table: Arrow's threads, which it lets call Python, abort one process
            # in ten as the interpreter ends (deltalake 1.6.6, pyarrow 26.0.1).
            return pa.table(self._scan(columns, after))
        except (DeltaError, OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from error

    def _scan(self, columns: Sequence[str], after: int | None = None) -> pa.RecordBatchReader:
        """Returns these columns of all rows, a batch at a time, as the schema has them."""
        fields = pa.schema([self.schema.field(name) for name in columns])
        if not self.version:  # the table was only made
            return fields.empty_table().to_reader()
        newer = None if after is None else f"sequence > {after}"
        lacking = self._lacking()
        present = [name for name in columns if name not in lacking]
        try:
            found = self._delta.scan(columns=present, predicate=newer)
            batches = pa.RecordBatchReader.from_stream(found)
            if present == list(columns):
                return batches.cast(fields)
        except (DeltaError, OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from error
        return pa.RecordBatchReader.from_batches(
            fields, (_with_nulls(batch, fields) for batch in batches)
        )

    def _unreadable(self, error: Exception) -> ManifestError:
        return ManifestError(
            f"{self.location}: version {self.version} cannot be read ({_in_one_line(error)})"
        )


def _with_nulls(batch: pa.RecordBatch, fields: pa.Schema) -> pa.RecordBatch:
    """Returns the batch with a column of nulls for each field that it lacks."""
    columns = [
        batch[field.name].cast(field.type)
        if field.name in batch.schema.names
        else pa.nulls(batch.num_rows, field.type)
        for field in fields
    ]
    return pa.record_batch(columns, schema=fields)


def _in_one_line(error: Exception) -> str:
    """Returns what Delta says, which draws a coloured tree of causes."""
    causes = (line.strip() for line in _TREE.sub("", str(error)).splitlines())
    text = ": ".join(filter(None, causes))
    return text if len(text) <= _MOST_SAID else f"{text[:_MOST_SAID]}…"


_TREE = re.compile(r"\x1b\[[0-9;]*m|↳")
_MOST_SAID = 400  # characters


def _commit_of(origin: str) -> CommitProperties:
    return CommitProperties(max_commit_retries=0, custom_metadata={_ORIGIN: origin})


def _newest(rows: pa.Table, identity: Sequence[str]) -> pa.Table:
    """Returns the row with the highest sequence for every identity."""
    if not rows.num_rows:
        return rows
    codes = np.zeros(rows.num_rows, np.int64)
    for name in identity:
        column = rows[name].combine_chunks().dictionary_encode()
        codes = codes * len(column.dictionary) + column.indices.to_numpy()
        codes = np.unique(codes, return_inverse=True)[1] if codes.max() >= len(codes) else codes
    oldest_first = np.argsort(rows["sequence"].to_numpy(), kind="stable")
    newest = np.full(int(codes.max()) + 1, -1, np.int64)
    newest[codes[oldest_first]] = oldest_first  # of a repeated index, the last assignment holds
    newest = newest[newest >= 0]
    return rows.take(np.sort(newest))


def _still_needed(rows: pa.Table, newer: pa.Table) -> pa.Table:
    """See `Manifest.commit`: which rows are needed on top of what others committed."""
    position = pc.index_in(rows["key"], value_set=newer["key"].combine_chunks())
    theirs = newer.take(position)  # null where nobody touched the key
    same_record = pc.and_(
        pc.equal(rows["fingerprint"], theirs["fingerprint"]),
        pc.equal(rows["split"], theirs["split"]),
    )
    as_good = pc.or_(pc.equal(theirs["state"], LIVE), pc.equal(theirs["state"], rows["state"]))
    removal_of_touched = pc.and_(pc.equal(rows["state"], REMOVED), pc.is_valid(position))
    pointless = pc.or_kleene(removal_of_touched, pc.and_(same_record, as_good))
    return rows.filter(pc.invert(pc.fill_null(pointless, False)))


def _untouched(rows: pa.Table, newer: pa.Table) -> pa.Table:
    """Returns the rows whose key nobody has touched meanwhile."""
    touched = pc.is_in(rows["key"], value_set=newer["key"].combine_chunks())
    return rows.filter(pc.invert(touched))


def _not_removed(rows: pa.Table) -> pa.Table:
    return rows.filter(pc.not_equal(rows["state"], REMOVED))


def _not_listed(rows: pa.Table, newer: pa.Table) -> pa.Table:
    """Returns the rows whose key and shard nobody has listed meanwhile."""
    names = ["key", "shard"]
    fresh = rows.select(names).join(newer.select(names), names, join_type="left anti")
    return rows.join(fresh, names, join_type="inner").select(rows.column_names)


def _kept_location(url: str) -> str:
    return storage.join(url, "manifest", "kept.json")


def _read_kept(url: str) -> Kept:
    location = _kept_location(url)
    if not storage.exists(location):
        return Kept(0)
    try:
        document = json.loads(storage.read_bytes(location))
        return Kept(int(document["first"]), frozenset(map(int, document["named"])))
    except (ValueError, KeyError, TypeError, StorageError) as error:
        raise ManifestError(
            f"{location}: does not say which versions are kept ({error})"
        ) from error


def _samples_location(url: str) -> str:
    return storage.join(url, "manifest", "samples")


def require_usable(url: str) -> None:
    """Raises ManifestError of a dataset's location that the table's library takes for another."""
    location = storage.absolute(url)
    odd = _ODD_IN_PATHS if storage.is_local(location) else _ODD_IN_URLS
    found = odd.search(location.partition("://")[2] or location)
    if found:
        raise ManifestError(
            f"{location!r}: a dataset's path must be without {found[0]!r}: delta-rs, which keeps "
            "the manifest, would take it for another path; give it one without any of % [ ] \\ | ^ "
            "and control characters, and in an object store without # ? and double slashes"
        )


def _uri(location: str) -> str:
    require_usable(location)
    return storage.absolute(location)
