"""Tars of others that need not be opened, since the manifest has every record of them.

The manifest says of a tar how many records it has, so that one whose rows were only listed in part,
by a run that was killed, is told from one that was done.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc
from msgspec.structs import replace

from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import State, foreign_tars
from pipeline.data.tars.foreign_tar import ForeignTar
from pipeline.reason import Reason


def find_unopened(manifest: Manifest, tars: Sequence[ForeignTar]) -> dict[ForeignTar, ForeignTar]:
    """Returns those of a source's tars that are unchanged, with what the manifest has of them.

    Records that were left out as copies of others have to be looked at whenever anything else
    changes: tars with such records are unchanged only if all tars are.
    """
    if not tars:
        return {}
    rows = manifest.rows(["state", "reason", "tar", "duplicate_of"])
    rows = rows.filter(pc.not_equal(rows["state"], State.REMOVED))
    is_copy = pc.or_(
        pc.is_valid(rows["duplicate_of"]),
        pc.fill_null(pc.equal(rows["reason"], Reason.DUPLICATE_ID), False),
    )
    held, number = foreign_tars(rows["tar"])
    has_tar = number >= 0
    counts = np.bincount(number[has_tar], minlength=len(held)).tolist()
    copies = np.bincount(number[has_tar & np.asarray(is_copy)], minlength=len(held)).tolist()
    wanted, listed, with_copies, num_rows = set(tars), {}, set(), 0
    for tar, num_listed, num_copies in zip(held, counts, copies, strict=True):
        uncounted = replace(tar, num_records=-1)
        if uncounted in wanted and num_listed == tar.num_records:
            listed[uncounted] = tar
            num_rows += num_listed
            if num_copies:
                with_copies.add(uncounted)
    if len(listed) == len(wanted) and num_rows == rows.num_rows:
        return listed
    return {tar: held for tar, held in listed.items() if tar not in with_copies}
