"""A table of rows with a `sequence`, to which versions are added by compare-and-set.

It is a Delta table at one version. Rows are only ever appended; the newest row of an identity is
what holds. A commit makes the version after the one it was prepared for, or it is prepared again on
top of what others committed meanwhile. Readers see the table before or after, never between, and an
old version stays readable until its files are removed.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import numpy as np
import pyarrow as pa
import xxhash
from deltalake import CommitProperties, DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from pipeline import storage
from pipeline.data.manifest.earlier_form import EarlierForm
from pipeline.data.manifest.engine import Engine, Scan
from pipeline.data.manifest.schema import row_codes
from pipeline.data.manifest.versions import Version
from pipeline.errors import ManifestError

# What delta-rs 1.6.6 undoes, cuts off or dies of; \ud800 and on are bytes that are not UTF-8.
_ODD_IN_PATHS = re.compile(r"[%\[\]\\|^\x00-\x1f\x7f\ud800-\udfff]")
_ODD_IN_URLS = re.compile(r"[%\[\]\\|^#?\x00-\x1f\x7f\ud800-\udfff]|//")

# Delta's own retries would put our commit after any other that does not conflict in its eyes: an
# append after every append, a second creation after the first.
_NO_RETRIES = CommitProperties(max_commit_retries=0)
_ORIGIN = "sightlineOrigin"  # among the properties of a commit
# A table is written anew when it is in more files than this, or more of its rows are superseded.
_MAX_FILES = 16
_MAX_SUPERSEDED = 0.1


@dataclass(frozen=True)
class TableForm:
    """What the rows of a table have."""

    schema: pa.Schema
    identity: tuple[str, ...]  # the columns that tell what a row is about
    earlier: EarlierForm  # that is read on


class Table:
    """One version of a table.

    `others` are the rows that other writers committed between the version that was first opened
    and this one, if this one came of `append`. A table of the earlier form is read as if it had the
    present one, and written anew in it before the first commit.
    """

    def __init__(
        self, location: str, form: TableForm, delta: DeltaTable, others: pa.Table | None = None
    ) -> None:
        self.location = location
        self.form = form
        self.version: int = delta.version()
        self._delta = delta
        self._others = form.schema.empty_table() if others is None else others
        self._found = frozenset(pa.schema(delta.schema()).names)

    @classmethod
    def open(cls, location: str, form: TableForm, version: int | None = None) -> "Table":
        options = storage.object_store_options(location)
        try:
            delta = DeltaTable(_uri(location), version=version, storage_options=options)
        except TableNotFoundError as error:
            raise ManifestError(f"{location}: no manifest here; ingest makes one") from error
        except (DeltaError, OSError) as error:
            wanted = "the manifest"
            if version is not None:
                newest = cls.open(location, form).version
                if version > newest:
                    raise ManifestError(
                        f"{location}: there is no version {version}; the newest is {newest}"
                    ) from error
                wanted = f"version {version} of the manifest"
            raise ManifestError(
                f"{location}: {wanted} cannot be opened ({_in_one_line(error)})"
            ) from error
        table = cls(location, form, delta)
        if table._found != set(form.schema.names) and not form.earlier.has(table._found):
            raise ManifestError(
                f"{location}: the columns are not those of a manifest of this version of "
                f"Sightline: expected {', '.join(form.schema.names)}; found "
                f"{', '.join(sorted(table._found))}"
            )
        return table

    @classmethod
    def create(cls, location: str, form: TableForm) -> "Table":
        if not cls.exists(location):
            options = storage.object_store_options(location)
            # Otherwise Delta forgets versions after 30 days, and runs name what they read.
            keep = {"delta.enableExpiredLogCleanup": "false"}
            try:
                delta = DeltaTable.create(
                    _uri(location),
                    form.schema,
                    configuration=keep,
                    storage_options=options,
                    commit_properties=_NO_RETRIES,
                )
                return cls(location, form, delta)
            except (DeltaError, OSError) as error:
                if not cls.exists(location):  # else another writer made it meanwhile
                    raise ManifestError(
                        f"{location}: cannot be created ({_in_one_line(error)})"
                    ) from error
        return cls.open(location, form)

    @staticmethod
    def exists(location: str) -> bool:
        options = storage.object_store_options(location)
        try:
            return bool(DeltaTable.is_deltatable(_uri(location), storage_options=options))
        except (DeltaError, OSError) as error:
            raise ManifestError(
                f"{location}: cannot be looked up ({_in_one_line(error)})"
            ) from error

    def newest(self, columns: Sequence[str] | None) -> pa.Table:
        """Returns the newest row of every identity, in no promised order."""
        names = self.form.schema.names if columns is None else list(columns)
        rows = self._read(sorted({*names, *self.form.identity, "sequence"}))
        return self._newest(rows).select(names)

    def register(self, engine: Engine, name: str, columns: Sequence[str]) -> None:
        """Makes `newest` of these columns a view of the engine."""
        engine.register_newest(
            name, lambda names: Scan(partial(self._scan, names)), self.form.identity, columns
        )

    def digest(self) -> str:
        """Returns what is the same of two tables only if they have the same rows."""
        # A file has a name that no other ever had, and is never written again.
        names = sorted(uri.rsplit("/", 1)[-1] for uri in self._delta.file_uris())
        return xxhash.xxh3_64_hexdigest("\n".join(names).encode())

    def raw(self, columns: Sequence[str], after: int) -> pa.Table:
        """Returns all rows that were committed after a version, superseded ones included."""
        return self._read(sorted({*columns, "sequence"}), after).select(list(columns))

    def shrink(self, needed: Callable[[pa.Table], pa.Table]) -> "Table":
        """Replaces all rows by the newest ones that are `needed`, unless that saves little."""
        table = self
        while True:
            rows = table._read(self.form.schema.names)
            smaller = needed(self._newest(rows))
            few_files = len(table._delta.file_uris()) <= _MAX_FILES
            if few_files and smaller.num_rows >= (1 - _MAX_SUPERSEDED) * rows.num_rows:
                return table
            try:
                table = table._replaced(smaller)
            except CommitFailedError:
                table = Table.open(self.location, self.form)
                continue
            table._delta.create_checkpoint()  # opens in one read instead of one a commit
            return table

    def _replaced(self, rows: pa.Table) -> "Table":
        """Commits a version with these rows alone, which keep their sequence.

        Raises CommitFailedError if another writer has made that version.
        """
        try:
            write_deltalake(
                self._delta,
                rows,
                mode="overwrite",
                schema_mode="overwrite" if self._is_earlier else None,
                commit_properties=_NO_RETRIES,
            )
        except CommitFailedError:
            raise
        except (DeltaError, OSError) as error:
            raise ManifestError(
                f"{self.location}: cannot commit ({_in_one_line(error)})"
            ) from error
        return Table.open(self.location, self.form, self.version + 1)

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
        needed: Callable[[pa.Table, pa.Table], pa.Table],
        origin: str = "",
    ) -> "Table":
        """Appends the rows as the next version; see `Manifest.commit`.

        `needed(rows, newer)` returns those of our rows that are needed on top of the newest
        rows that others have committed.
        """
        table, others = self, self._others
        rows = self._fitting(rows)
        if others.num_rows:
            rows = needed(rows, self._newest(others))
        while rows.num_rows:
            try:
                if table._is_earlier:
                    table = table._replaced(table.newest(None))
                table = table._appended(rows, origin)
            except CommitFailedError:
                latest = Table.open(self.location, self.form)
                latest._refuse_others(origin, table.version)
                newer = latest._read(self.form.schema.names, after=table.version)
                others = pa.concat_tables([others, newer])
                rows = needed(rows, self._newest(others))
                table = latest
            else:
                return Table(self.location, self.form, table._delta, others)
        return Table(self.location, self.form, table._delta, others)

    def _appended(self, rows: pa.Table, origin: str) -> "Table":
        """Commits a version with these rows behind those there are.

        Raises CommitFailedError if another writer has made that version.
        """
        version = self.version + 1
        sequence = pa.repeat(pa.scalar(version, pa.int64()), rows.num_rows)
        index = self.form.schema.get_field_index("sequence")
        try:
            write_deltalake(
                self._delta,
                rows.set_column(index, "sequence", sequence),
                mode="append",
                commit_properties=_commit_of(origin) if origin else _NO_RETRIES,
            )
        except CommitFailedError:
            raise
        except (DeltaError, OSError) as error:
            raise ManifestError(
                f"{self.location}: cannot commit ({_in_one_line(error)})"
            ) from error
        if self._delta.version() != version:  # others have committed since
            return Table.open(self.location, self.form, version)
        return Table(self.location, self.form, self._delta)

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

    @property
    def _is_earlier(self) -> bool:
        return self._found != set(self.form.schema.names)

    def _fitting(self, rows: pa.Table) -> pa.Table:
        if "sequence" not in rows.column_names:
            rows = rows.append_column("sequence", pa.nulls(rows.num_rows, pa.int64()))
        try:
            rows = rows.select(self.form.schema.names).cast(self.form.schema)
        except (KeyError, pa.ArrowInvalid) as error:
            raise ManifestError(
                f"{self.location}: rows do not fit the manifest: {error}"
            ) from error
        identity = list(self.form.identity)
        distinct = rows.group_by(identity).aggregate([]).num_rows
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
        fields = pa.schema([self.form.schema.field(name) for name in columns])
        if not self.version:  # the table was only made
            return fields.empty_table().to_reader()
        newer = None if after is None else f"sequence > {after}"
        found = list(columns)
        if self._is_earlier:
            found = sorted(self.form.earlier.columns_of(columns) & self._found)
        try:
            scanned = self._delta.scan(columns=found, predicate=newer)
            batches = pa.RecordBatchReader.from_stream(scanned)
            if not self._is_earlier:
                return batches.cast(fields)
        except (DeltaError, OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from error
        converted = (self.form.earlier.converted(batch, fields) for batch in batches)
        return pa.RecordBatchReader.from_batches(fields, converted)

    def _unreadable(self, error: Exception) -> ManifestError:
        return ManifestError(
            f"{self.location}: version {self.version} cannot be read ({_in_one_line(error)})"
        )

    def _newest(self, rows: pa.Table) -> pa.Table:
        """Returns the row with the highest sequence for every identity."""
        if not rows.num_rows:
            return rows
        codes = row_codes(rows, self.form.identity)
        oldest_first = np.argsort(rows["sequence"].to_numpy(), kind="stable")
        newest = np.full(int(codes.max()) + 1, -1, np.int64)
        newest[codes[oldest_first]] = oldest_first  # of a repeated index, the last one holds
        newest = newest[newest >= 0]
        return rows.take(np.sort(newest))


def _in_one_line(error: Exception) -> str:
    """Returns what Delta says, which draws a coloured tree of causes."""
    causes = (line.strip() for line in _TREE.sub("", str(error)).splitlines())
    text = ": ".join(filter(None, causes))
    return text if len(text) <= _MOST_SAID else f"{text[:_MOST_SAID]}…"


_TREE = re.compile(r"\x1b\[[0-9;]*m|↳")
_MOST_SAID = 400  # characters


def _commit_of(origin: str) -> CommitProperties:
    return CommitProperties(max_commit_retries=0, custom_metadata={_ORIGIN: origin})


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
