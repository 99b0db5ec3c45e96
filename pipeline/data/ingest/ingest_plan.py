"""The ingest plan: what is to be written, removed or left alone.

No image is opened here. A record is left alone when the manifest has its split and fingerprint,
whether it became a sample or a reject; but a copy of an image is looked at again when the sample
that it was a copy of is no longer there as it was. The records of a tar that was not even opened,
because the manifest has them all, are left alone together.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.ingest.comparison import Comparison
from pipeline.data.ingest.image_policy import ImagePolicy
from pipeline.data.ingest.listing_spool import ListingSpool
from pipeline.data.manifest.engine import Engine
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import (
    SAMPLES,
    Int64Array,
    State,
    arrow_schema,
    foreign_tars,
)
from pipeline.data.sources.base import Record, Source
from pipeline.data.sources.columns import listed
from pipeline.data.sources.digests import digests
from pipeline.data.tars.foreign_tar import ForeignTar
from pipeline.errors import SourceError

# Records to be written. Tables, because a listing of millions would not fit as Python objects.
CHANGED = arrow_schema(Record)

# What a sample's image is recognised by, should another be a copy of it.
HOLDERS = pa.schema([SAMPLES.field(name) for name in ("key", "source_digest", "perceptual_hash")])

_IMAGE_COLUMNS = ("split", "suffix", "image_fingerprint")  # an image can stay if these are the same

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ShardPlan:
    """The records that go into one shard: a plain message to whoever writes it."""

    url: str
    split: str
    records: pa.Table  # schema CHANGED, in the shard's order
    known: pa.Table  # schema SAMPLES: the live rows that some of them had until now
    keep_images: bool  # only texts changed: the shard holds no images, the old rows say where
    policy: ImagePolicy
    # Schema SAMPLES: rejects that were found before writing, to be listed with the shard.
    left_out: pa.Table = field(default_factory=SAMPLES.empty_table)


@dataclass(frozen=True)
class IngestPlan:
    """What a run has to do."""

    manifest: Manifest
    changed: pa.Table  # schema CHANGED, in the order of the keys' hashes
    known: pa.Table  # schema SAMPLES: the live rows of changed keys
    settled: pa.Table  # schema SAMPLES: rows that need no image, listed rejects and removals
    rejects: pa.Table  # of the listed rejects and the unchanged ones: reason, count, some detail
    held: pa.Table  # of what the manifest has before anything is done: reason or null, count
    lost: pa.Table  # key and reason of live samples that are rejects now, or, "", listed no more
    num_listed: int
    num_added: int
    num_edited: int
    num_removed: int

    @property
    def num_unchanged(self) -> int:
        """The listed records that the manifest has as they are."""
        return self.num_listed - self.num_added - self.num_edited

    def shards(self, samples_per_shard: int, policy: ImagePolicy) -> Iterator[ShardPlan]:
        """Cuts the changed records into shards: of one split, with images or without."""
        old_row, keeps_image = self._old_rows()
        split_of_row = np.array(self.changed["split"].to_pylist(), object)
        for split in sorted(set(split_of_row)):
            for keep_images in (False, True):
                rows = np.flatnonzero((split_of_row == split) & (keeps_image == keep_images))
                for part in self._cut(rows, samples_per_shard, keep_images):
                    before = old_row[part]
                    yield ShardPlan(
                        url=self.manifest.url,
                        split=split,
                        records=self.changed.take(part),
                        known=self.known.take(before[before >= 0]),
                        keep_images=keep_images,
                        policy=policy,
                    )

    def _cut(
        self, rows: Int64Array, samples_per_shard: int, keep_images: bool
    ) -> Iterator[Int64Array]:
        """Cuts rows of one split into shards: images that stay in a tar of others make one."""
        tars, number = foreign_tars(self.changed["tar"].take(pa.array(rows)))
        if keep_images:
            number = np.full_like(number, -1)
        copied = rows[number < 0]
        for start in range(0, len(copied), samples_per_shard):
            yield copied[start : start + samples_per_shard]
        offsets = self.changed["image_offset"].fill_null(-1).to_numpy()[rows]
        in_order = np.lexsort((offsets, number))
        ends = np.searchsorted(number[in_order], np.arange(len(tars) + 1))
        for start, end in pairwise(ends.tolist()):
            if end > start:
                yield rows[in_order[start:end]]

    @property
    def num_live(self) -> int:
        """The samples of the dataset before anything is done."""
        live = self.held.filter(pc.is_null(self.held["reason"]))
        return pc.sum(live["count"]).as_py() or 0

    def holders(self) -> pa.Table:
        """Returns the live samples whose images this run leaves as they are; schema HOLDERS."""
        samples = self.manifest.samples([*HOLDERS.names, "digest"])
        _, keeps_image = self._old_rows()
        rewritten = self.changed["key"].filter(pa.array(~keeps_image))
        gone = [*rewritten.chunks, *self.settled["key"].chunks]
        gone_keys = pa.chunked_array(gone, pa.string()).combine_chunks()
        samples = samples.filter(pc.invert(pc.is_in(samples["key"], value_set=gone_keys)))
        digest = pc.coalesce(samples["source_digest"], samples["digest"])
        place = samples.schema.get_field_index("source_digest")
        return samples.set_column(place, "source_digest", digest).select(HOLDERS.names)

    def _old_rows(self) -> tuple[Int64Array, BoolArray]:
        """Returns for each changed record its row in `known`, or -1, and if its image stays."""
        old_row = pc.index_in(self.changed["key"], value_set=self.known["key"].combine_chunks())
        old = self.known.select(_IMAGE_COLUMNS).take(old_row)  # null where there is none
        same = [pc.equal(self.changed[name], old[name]) for name in _IMAGE_COLUMNS]
        keeps_image = pc.fill_null(reduce(pc.and_kleene, same), False).to_numpy()
        return pc.fill_null(old_row, -1).to_numpy(), keeps_image


def plan_ingest(
    source: Source, manifest: Manifest, unopened: Collection[ForeignTar] = ()
) -> IngestPlan:
    """Compares a source's listing with a manifest.

    The second and later records of a key become `duplicate-id` rejects under keys of their own.
    What the manifest has of `unopened` tars counts as listed and unchanged; a
    record that shares its key with one of those raises SharedKeyError, since which of them is
    the first cannot be told. Raises SourceError if nothing is listed: an empty listing would
    remove every sample.
    """
    with Engine() as engine, ListingSpool() as spool:
        found = Comparison(engine, spool, manifest, listed(source), unopened)
        num_listed = found.num_listed + found.num_unopened
        if not num_listed:
            raise SourceError(
                f"{manifest.url}: the source lists no record at all; nothing was changed, because "
                "an empty listing would remove every sample"
            )
        changed = _to_write(found.changed())
        rejects, moved = _rejected(found.rejects()), found.moved()
        return IngestPlan(
            manifest=manifest,
            changed=changed,
            known=_held_rows(manifest, found.edited_samples()["key"]),
            settled=pa.concat_tables(
                [rejects, _rows(found.removed(), State.REMOVED), _with_tars(manifest, moved)]
            ),
            rejects=pa.concat_tables([counted(rejects), found.unchanged_rejects()]),
            held=found.held(),
            lost=found.lost(),
            num_listed=num_listed,
            num_added=found.num_added,
            num_edited=found.num_edited,
            num_removed=found.num_removed,
        )


def counted(rejects: pa.Table) -> pa.Table:
    """Returns how many rejects there are for each reason, with the detail of one."""
    found = rejects.group_by("reason").aggregate([("detail", "count"), ("detail", "min")])
    return found.rename_columns(["reason", "count", "detail"])


def held_by_reason(manifest: Manifest) -> pa.Table:
    """Returns how many rows a manifest has by reason, null of live samples; removals aside."""
    with Engine() as engine:
        manifest.register(engine, "rows", ["state", "reason"])
        return engine.table(
            "SELECT if(state = 'reject', reason, NULL) AS reason, count(*) AS count FROM rows "
            "WHERE state <> 'removed' GROUP BY ALL"
        )


def _to_write(records: pa.Table) -> pa.Table:
    """Returns listed records in the order of their keys' hashes; schema CHANGED."""
    order = np.argsort(digests(records["key"].combine_chunks()), kind="stable")
    records = records.take(pa.array(order)).combine_chunks()
    columns = {name: records[name] for name in records.column_names}
    texts = list(CHANGED.field("texts").type)
    parts = [records["texts" if field.name == "payload" else field.name] for field in texts]
    columns["texts"] = pa.StructArray.from_arrays(
        [part.combine_chunks().cast(field.type) for part, field in zip(parts, texts, strict=True)],
        fields=texts,
    )
    columns["num_entries"] = columns["num_entries"].cast(pa.int64())
    columns["perceptual_hash"] = pa.nulls(len(order), pa.int64())
    return pa.table([columns[name] for name in CHANGED.names], schema=CHANGED)


def _rejected(rejects: pa.Table) -> pa.Table:
    """Returns the rows of listed rejects; schema SAMPLES."""
    names = ("key", "split", "reason", "detail", "image_fingerprint", "texts_fingerprint", "tar")
    return _rows(rejects.select(names), State.REJECT)


def _rows(columns: pa.Table, state: State) -> pa.Table:
    """Returns rows of the manifest with these columns, the others null."""
    columns = columns.append_column("state", pa.repeat(state.value, columns.num_rows))
    return (
        pa.concat_tables([SAMPLES.empty_table(), columns], promote_options="default")
        .select(SAMPLES.names)
        .cast(SAMPLES)
    )


def _held_rows(manifest: Manifest, keys: pa.ChunkedArray) -> pa.Table:
    """Returns the manifest's rows of some keys; schema SAMPLES."""
    if not len(keys):
        return SAMPLES.empty_table()
    with Engine() as engine:
        engine.register("wanted", pa.table({"key": keys}))
        manifest.register(engine, "held", SAMPLES.names)
        columns = ", ".join(SAMPLES.names)
        return engine.table(f"SELECT {columns} FROM held WHERE key IN (FROM wanted)").cast(SAMPLES)


def _with_tars(manifest: Manifest, moved: pa.Table) -> pa.Table:
    """Returns the rows of some keys with the tars that they are listed in now."""
    if not moved.num_rows:
        return SAMPLES.empty_table()
    held = _held_rows(manifest, moved["key"])
    place = pc.index_in(held["key"], value_set=moved["key"].combine_chunks())
    column = held.schema.get_field_index("tar")
    return held.set_column(column, "tar", moved["tar"].take(place))
