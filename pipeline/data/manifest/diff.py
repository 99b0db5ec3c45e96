"""The difference between two versions of a manifest, sample by sample."""

from collections import Counter
from dataclasses import dataclass
from functools import reduce

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.manifest.manifest import LIVE, REJECT, REMOVED, Manifest
from pipeline.data.sources.base import same_texts

CHANGES = ("added", "removed", "image", "texts", "image and texts", "split", "rejected", "cleared")
_OLD, _NEW = " before", " after"
_IDENTITY = ("state", "split", "fingerprint")
_COLUMNS = ("key", "split", "state", "reason", "fingerprint", "digest", "suffix")

DIFFERENCE = pa.schema(
    [
        ("key", pa.string()),
        ("change", pa.string()),  # one of CHANGES
        ("split", pa.string()),  # in the newer version, if it is there
        ("was", pa.string()),  # what it was before: a split, or a reject's reason
    ]
)


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
    old, new = (rows.filter(pc.not_equal(rows["state"], REMOVED)) for rows in (old, new))
    pairs = old.join(new, "key", join_type="full outer", left_suffix=_OLD, right_suffix=_NEW)
    same = [pc.equal(pairs[name + _OLD], pairs[name + _NEW]) for name in _IDENTITY]
    unchanged = pc.fill_null(reduce(pc.and_kleene, same), False)
    pairs = pairs.filter(pc.invert(unchanged)).sort_by("key")
    found = [row for pair in pairs.to_pylist() if (row := _change(pair)) is not None]
    return Difference(
        before,
        after,
        num_before=_num_live(old),
        num_after=_num_live(new),
        rows=pa.Table.from_pylist(found, DIFFERENCE),
    )


def _change(pair: dict[str, str | None]) -> dict[str, str | None] | None:
    """Returns the row of a pair that differs, or None if its source was only touched."""
    old, new = ({name: pair[name + age] for name in _COLUMNS[1:]} for age in (_OLD, _NEW))
    row = {"key": pair["key"], "split": new["split"] or old["split"], "was": None}
    was_live, is_live = old["state"] == LIVE, new["state"] == LIVE
    if not is_live:
        if was_live:
            return row | {"change": "rejected" if new["state"] == REJECT else "removed"}
        if new["state"] is None:
            return row | {"change": "cleared", "was": old["reason"]}
        return None if old["state"] == REJECT else row | {"change": "rejected"}
    if not was_live:
        return row | {"change": "added", "was": old["reason"]}
    if old["split"] != new["split"]:
        return row | {"change": "split", "was": old["split"]}
    changed = []
    if (old["digest"], old["suffix"]) != (new["digest"], new["suffix"]):
        changed.append("image")
    if not same_texts(old["fingerprint"] or "", new["fingerprint"] or ""):
        changed.append("texts")
    return row | {"change": " and ".join(changed)} if changed else None


def _num_live(rows: pa.Table) -> int:
    return len(rows.filter(pc.equal(rows["state"], LIVE)))
