"""The manifest: which samples of a dataset exist, where in which shard, and why others do not.

It is a table of `SampleRow` under `DATASET/manifest/samples`, and beside it one of `FeatureRow` for
each extractor under `features/<extractor>`. The newest row of a key is what holds; an old version
stays readable until `compact` drops it.
"""

from collections.abc import Collection, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.data.manifest.earlier_form import EARLIER_SAMPLES
from pipeline.data.manifest.engine import Engine
from pipeline.data.manifest.features import FeatureManifest
from pipeline.data.manifest.schema import SAMPLES, State, judgements
from pipeline.data.manifest.table import Table, TableForm
from pipeline.data.manifest.versions import Kept, Version, read_kept, write_kept
from pipeline.errors import ManifestError

_FORM = TableForm(SAMPLES, ("key",), EARLIER_SAMPLES)
_SAME_RECORD = ("split", "image_fingerprint", "texts_fingerprint")


class Manifest:
    """One version of a dataset's manifest. `url` is the dataset's, not the table's."""

    def __init__(self, url: str, table: Table) -> None:
        self.url = url
        self.version = table.version
        self._table = table

    @classmethod
    def open(cls, url: str, version: int | None = None) -> "Manifest":
        """Opens a version, or the newest.

        Raises ManifestError if the dataset has none, or this version was dropped.
        """
        if version is not None and version not in (kept := read_kept(url)):
            raise ManifestError(
                f"{url}: version {version} was dropped by `sightline data compact`; "
                f"kept: {kept}. Open one of these, or ingest and train again"
            )
        return cls(url, Table.open(_samples_location(url), _FORM, version))

    @classmethod
    def create(cls, url: str) -> "Manifest":
        """Opens the newest version, of an empty manifest made now if there was none.

        Safe when several do this at once: one of them makes it.
        """
        return cls(url, Table.create(_samples_location(url), _FORM))

    @staticmethod
    def exists(url: str) -> bool:
        """Whether a dataset with a manifest is there."""
        return Table.exists(_samples_location(url))

    def rows(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns the newest row of every key, removed keys included, in no promised order."""
        return self._table.newest(columns)

    def samples(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns the live samples, in no promised order."""
        return self._in_state(State.LIVE, columns)

    def rejects(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns the records that did not become samples, with reason and detail."""
        return self._in_state(State.REJECT, columns)

    def register(self, engine: Engine, name: str, columns: Sequence[str]) -> None:
        """Makes `rows` of these columns a view of the engine, which reads them as a stream."""
        self._table.register(engine, name, columns)

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
        return read_kept(self.url)

    def relocate(self, rows: pa.Table) -> "Manifest":
        """Appends rows that differ from the present ones in where the samples lie.

        A row is dropped if others have committed one of its key since this manifest was opened.
        Otherwise as `commit`.
        """
        return Manifest(self.url, self._table.append(rows, _untouched))

    def shrink(self) -> "Manifest":
        """Makes a version without superseded rows and removals, if it would be much smaller."""
        return Manifest(self.url, self._table.shrink(_not_removed))

    def drop_versions(self, kept: Kept, unused: Collection[str]) -> None:
        """Forgets all versions but `kept`, and removes `unused` files of the table.

        From now on opening a dropped version raises ManifestError.
        """
        known = read_kept(self.url)
        kept = Kept(max(kept.first, known.first), frozenset(v for v in kept.named if v in known))
        write_kept(self.url, kept)
        self._table.remove_files(unused)

    def unused_files(self, kept: Collection[int], min_age_hours: int) -> list[str]:
        """Returns the table's files that no kept version and no recent reader or writer needs."""
        return self._table.unused_files(kept, min_age_hours)

    def commit(self, rows: pa.Table, origin: str = "") -> "Manifest":
        """Appends rows (schema `SAMPLES`, `sequence` optional) and returns the new version.

        What other writers have committed since this manifest was opened stays: rows that it has
        made pointless are dropped, the rest goes on top. Pointless are a row whose key has this
        split, fingerprints and judgement by now, live or in the row's own state, and a removal of a
        key that others touched. The manifest that is returned remembers what others did, so that
        a chain of commits may be planned from its first version. Without rows nothing is committed.
        `origin` names what the rows come of: with one, nothing is put on top of the commits of
        another origin. Raises ManifestError of these, and if rows do not fit or name a key twice.
        """
        return Manifest(self.url, self._table.append(rows, _still_needed, origin))

    def features(self, extractor: str) -> FeatureManifest:
        """Returns the newest list of what an extractor has made; it may be empty."""
        return FeatureManifest(self.url, extractor)

    def extractors(self) -> list[str]:
        """Returns the names of the extractors that have listed features."""
        return storage.list_names(storage.join(self.url, "manifest", "features"))

    def _in_state(self, state: str, columns: Sequence[str] | None) -> pa.Table:
        names = SAMPLES.names if columns is None else list(columns)
        rows = self.rows(sorted({*names, "state"}))
        return rows.filter(pc.equal(rows["state"], state)).select(names)


def _still_needed(rows: pa.Table, newer: pa.Table) -> pa.Table:
    """See `Manifest.commit`: which rows are needed on top of what others committed."""
    position = pc.index_in(rows["key"], value_set=newer["key"].combine_chunks())
    theirs = newer.take(position)  # null where nobody touched the key
    same_record = pc.equal(judgements(rows), judgements(theirs))
    for name in _SAME_RECORD:
        same_record = pc.and_kleene(same_record, pc.equal(rows[name], theirs[name]))
    as_good = pc.or_(
        pc.equal(theirs["state"], State.LIVE), pc.equal(theirs["state"], rows["state"])
    )
    removal_of_touched = pc.and_(pc.equal(rows["state"], State.REMOVED), pc.is_valid(position))
    pointless = pc.or_kleene(removal_of_touched, pc.and_(same_record, as_good))
    return rows.filter(pc.invert(pc.fill_null(pointless, False)))


def _untouched(rows: pa.Table, newer: pa.Table) -> pa.Table:
    """Returns the rows whose key nobody has touched meanwhile."""
    touched = pc.is_in(rows["key"], value_set=newer["key"].combine_chunks())
    return rows.filter(pc.invert(touched))


def _not_removed(rows: pa.Table) -> pa.Table:
    return rows.filter(pc.not_equal(rows["state"], State.REMOVED))


def _samples_location(url: str) -> str:
    return storage.join(url, "manifest", "samples")
