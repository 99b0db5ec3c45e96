"""The manifest of an extractor's features: what was made of which sample, and where it lies."""

from collections.abc import Collection, Sequence
from datetime import datetime

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.data.manifest.earlier_form import earlier_features
from pipeline.data.manifest.engine import Engine
from pipeline.data.manifest.schema import FEATURES, matching_rows
from pipeline.data.manifest.table import Table, TableForm

_IDENTITY = ("key", "shard")


class FeatureManifest:
    """The features that one extractor has made for a dataset.

    A row holds for a key in a shard, so that an older version of the dataset, whose sample lay
    in another shard, keeps the features it was trained with.
    """

    def __init__(self, url: str, extractor: str) -> None:
        self.url = url
        self.extractor = extractor
        self._form = TableForm(FEATURES, _IDENTITY, earlier_features(url, extractor))

    def rows(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns the newest row of every key in every shard, in no promised order."""
        if not Table.exists(self._location()):
            return FEATURES.empty_table().select(FEATURES.names if columns is None else columns)
        return self._table().newest(columns)

    def register(self, engine: Engine, name: str, columns: Sequence[str]) -> None:
        """Makes `rows` of these columns a view of the engine, which reads them as a stream."""
        if Table.exists(self._location()):
            self._table().register(engine, name, columns)
        else:
            engine.register(name, FEATURES.empty_table().select(list(columns)))

    def digest(self) -> str:
        """Returns what is the same at two times only if the rows are the same."""
        return self._table().digest() if Table.exists(self._location()) else "none"

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
        return Table.create(self._location(), self._form).append(rows, _not_listed).version

    def shrink(self, needed_shards: Collection[str], since: datetime) -> None:
        """Drops superseded rows and those of other shards, but for rows committed `since` a time.

        Does nothing if the list would hardly be smaller.
        """
        if not Table.exists(self._location()):
            return
        table = self._table()
        before = max((v.version for v in table.versions() if v.time < since), default=-1)
        shards = pa.array(sorted(needed_shards), pa.string())

        def needed(rows: pa.Table) -> pa.Table:
            recent = pc.greater(rows["sequence"], before)
            return rows.filter(pc.or_(pc.is_in(rows["shard"], value_set=shards), recent))

        table.shrink(needed)

    def remove_unused_files(self, min_age_hours: int) -> int:
        """Removes the table's files that no recent reader or writer needs; returns how many."""
        if not Table.exists(self._location()):
            return 0
        table = self._table()
        unused = table.unused_files((), min_age_hours)
        table.remove_files(unused)
        return len(unused)

    def _table(self) -> Table:
        return Table.open(self._location(), self._form)

    def _location(self) -> str:
        return storage.join(self.url, "manifest", "features", self.extractor)


def _not_listed(rows: pa.Table, newer: pa.Table) -> pa.Table:
    """Returns the rows whose key and shard nobody has listed meanwhile."""
    return rows.filter(pa.array(matching_rows(rows, newer, _IDENTITY) < 0))
