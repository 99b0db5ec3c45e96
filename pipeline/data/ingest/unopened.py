"""Tars of others that need not be opened, since the manifest has every record of them.

A tar's name in the manifest says how many records it has, so that one whose rows were only listed
in part, by a run that was killed, is told from one that was done.
"""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.manifest.manifest import REMOVED, Manifest
from pipeline.data.tars.foreign_tar import ForeignTar


def find_unopened(manifest: Manifest, tars: Sequence[ForeignTar]) -> dict[ForeignTar, str]:
    """Returns those of a source's tars that are unchanged, with their names in the manifest.

    Records that were left out as copies of others have to be looked at whenever anything else
    changes: tars with such records are unchanged only if all tars are.
    """
    if not tars:
        return {}
    rows = manifest.rows(["state", "reason", "tar", "duplicate_of"])
    rows = rows.filter(pc.not_equal(rows["state"], REMOVED))
    is_copy = pc.or_(
        pc.is_valid(rows["duplicate_of"]),
        pc.fill_null(pc.equal(rows["reason"], "duplicate-id"), False),
    )
    records = pa.table({"tar": rows["tar"], "is_copy": pc.cast(is_copy, pa.int64())})
    groups = records.group_by("tar").aggregate([("is_copy", "sum"), ("is_copy", "count")])
    wanted, listed, with_copies, num_rows = set(tars), {}, set(), 0
    for group in groups.filter(pc.is_valid(groups["tar"])).to_pylist():
        tar, num_records = ForeignTar.named(group["tar"]).counted()
        if tar in wanted and group["is_copy_count"] == num_records:
            listed[tar] = str(group["tar"])
            num_rows += num_records
            if group["is_copy_sum"]:
                with_copies.add(tar)
    if len(listed) == len(wanted) and num_rows == rows.num_rows:
        return listed
    return {tar: name for tar, name in listed.items() if tar not in with_copies}
