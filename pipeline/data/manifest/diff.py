"""The difference between two versions of a manifest, sample by sample."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import (
    SampleRow,
    State,
    arrow_schema,
    from_table,
    matching_rows,
    to_table,
)

CHANGES = ("added", "removed", "image", "texts", "image and texts", "split", "rejected", "cleared")
_IDENTITY = ("state", "split", "image_fingerprint", "texts_fingerprint")
_COLUMNS = ("key", *_IDENTITY, "reason", "digest", "suffix")


class Change(msgspec.Struct, frozen=True, omit_defaults=True):
    """What has become of a sample or a reject."""

    key: str
    change: str  # one of CHANGES
    split: str  # in the newer version, if it is there
    was: str = ""  # what it was before: a split, or a reject's reason


DIFFERENCE = arrow_schema(Change)


@dataclass(frozen=True)
class Difference:
    """What has changed. Where a sample lies is no change: `compact` moves samples."""

    before: int
    after: int
    num_before: int  # live samples
    num_after: int
    rows: pa.Table  # schema DIFFERENCE, sorted by key

    def counts(self) -> dict[str, int]:
        """Returns how many samples changed in which way, in the order of CHANGES."""
        counted = Counter(self.rows["change"].to_pylist())
        return {change: counted[change] for change in CHANGES if change in counted}


def diff(url: str, before: int, after: int) -> Difference:
    """Compares two versions.

    A sample is `added` or `removed`; a record is `rejected` now that was a sample or not listed,
    or `cleared`, a reject that is listed no more. A sample in another `split` may have changed
    otherwise too; else it is its `image`, its `texts` or both. Raises ManifestError if a version
    cannot be opened.
    """
    old, new = (Manifest.open(url, version).rows(_COLUMNS) for version in (before, after))
    old, new = (rows.filter(pc.not_equal(rows["state"], State.REMOVED)) for rows in (old, new))
    found = [change for pair in _differing(old, new) if (change := _change(*pair)) is not None]
    return Difference(
        before,
        after,
        num_before=_num_live(old),
        num_after=_num_live(new),
        rows=to_table(sorted(found, key=lambda change: change.key), Change),
    )


def _differing(old: pa.Table, new: pa.Table) -> Iterator[tuple[SampleRow | None, SampleRow | None]]:
    """Yields what two versions have of each key, if it is not the same."""
    place = matching_rows(new, old, ["key"])
    before = old.take(pa.array(place, mask=place < 0))
    same = reduce(pc.and_kleene, [pc.equal(before[name], new[name]) for name in _IDENTITY])
    other = ~np.asarray(pc.fill_null(same, False))
    known = other & (place >= 0)
    yield from zip(
        from_table(before.filter(pa.array(known)), SampleRow),
        from_table(new.filter(pa.array(known)), SampleRow),
        strict=True,
    )
    for row in from_table(new.filter(pa.array(place < 0)), SampleRow):
        yield None, row
    left = np.ones(old.num_rows, bool)
    left[place[place >= 0]] = False
    for row in from_table(old.filter(pa.array(left)), SampleRow):
        yield row, None


def _change(old: SampleRow | None, new: SampleRow | None) -> Change | None:
    """Returns what has changed, or None if the source was only touched."""
    was_live = old is not None and old.state == State.LIVE
    if new is None:
        assert old is not None
        if was_live:
            return Change(old.key, "removed", old.split)
        return Change(old.key, "cleared", old.split, old.reason or "")
    if new.state != State.LIVE:
        if old is not None and not was_live:
            return None
        return Change(new.key, "rejected", new.split)
    if old is None or not was_live:
        return Change(new.key, "added", new.split, (old and old.reason) or "")
    if old.split != new.split:
        return Change(new.key, "split", new.split, old.split)
    changed = []
    if (old.digest, old.suffix) != (new.digest, new.suffix):
        changed.append("image")
    if old.texts_fingerprint != new.texts_fingerprint:
        changed.append("texts")
    return Change(new.key, " and ".join(changed), new.split) if changed else None


def _num_live(rows: pa.Table) -> int:
    return len(rows.filter(pc.equal(rows["state"], State.LIVE)))
