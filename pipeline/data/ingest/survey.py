"""The survey for duplicates: every image is looked at before any is kept.

An image is read here and, if it stays, once more when its shard is written: only so can a shard
be whole and hold no copy, however many Ray tasks write at the same time.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import tee

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.ingest.duplicates import Duplicates
from pipeline.data.ingest.ingest_plan import ShardPlan
from pipeline.data.ingest.outcome import reject_row
from pipeline.data.ingest.shard_tasks import run_tasks
from pipeline.data.manifest.schema import SampleRow, from_table, to_table
from pipeline.data.media.image_check import BadImageError
from pipeline.data.media.perceptual_hash import perceptual_hash
from pipeline.data.sources.base import Record, Source
from pipeline.digest import digest_of
from pipeline.errors import SourceError
from pipeline.reason import Reason


class Surveyed(msgspec.Struct, frozen=True, omit_defaults=True):
    """Of a record of a plan: what its image is recognised by, or the row of a reject."""

    key: str
    source_digest: str = ""
    perceptual_hash: int | None = None
    reject: SampleRow | None = None


def without_duplicates(
    plans: Iterator[ShardPlan], source: Source, duplicates: Duplicates, bound: int
) -> Iterator[ShardPlan]:
    """Yields the plans, in order, without the records that are to be rejected for their images.

    These are in `left_out`. `bound` Ray tasks look at images at a time; with 0 it is done here.
    """
    plans, surveyed = tee(plans)
    looked_at = run_tasks(look_at_images, surveyed, source, bound, in_order=True)
    for plan, images in zip(plans, looked_at, strict=True):
        yield plan if plan.keep_images else _decided(plan, images, duplicates)


def look_at_images(plan: ShardPlan, source: Source) -> pa.Table:
    """Reads, checks and hashes the images of a plan; returns a row for each."""
    records = [] if plan.keep_images else from_table(plan.records, Record)
    return to_table([_surveyed(record, plan, source) for record in records], Surveyed)


def _surveyed(record: Record, plan: ShardPlan, source: Source) -> Surveyed:
    near = plan.policy.filters.duplicates == "near"
    try:
        payload = source.read(record)
        plan.policy.examine(payload)
        hashed = perceptual_hash(payload) if near else None
    except SourceError as error:
        reject = reject_row(record, Reason.UNREADABLE_IMAGE, str(error))
        return Surveyed(record.key, reject=reject)
    except BadImageError as error:
        detail = f"{record.image}: {error.detail}"
        return Surveyed(record.key, reject=reject_row(record, error.reason, detail))
    return Surveyed(record.key, digest_of(payload), hashed)


def _decided(plan: ShardPlan, images: pa.Table, duplicates: Duplicates) -> ShardPlan:
    whole = pc.is_null(images["reject"])
    faulty = [each.reject for each in from_table(images, Surveyed) if each.reject is not None]
    records, images = plan.records.filter(whole), images.filter(whole)
    copies = duplicates.find(images)
    unique = pa.array([copy is None for copy in copies], pa.bool_())
    copied = from_table(records.filter(pc.invert(unique)), Record)
    rejects = [
        reject_row(record, copy.reason, f"{record.image}: {copy.detail}", copy.of)
        for record, copy in zip(copied, filter(None, copies), strict=True)
    ]
    hashes = images["perceptual_hash"]
    records = records.set_column(
        records.schema.get_field_index("perceptual_hash"), "perceptual_hash", hashes
    )
    return replace(
        plan,
        records=records.filter(unique),
        policy=replace(plan.policy, verify="header"),  # they were decoded just now
        left_out=to_table([*faulty, *rejects], SampleRow),
    )
