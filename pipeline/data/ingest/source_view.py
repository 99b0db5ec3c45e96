"""The source view: a source's records as a recipe wants them, to be compared with the manifest.

Captions of unwanted length are gone, and fingerprints tell what the recipe wants told: also of
the settings that images are treated by, and of the images' bytes where it asks for that. Tars that
keep their images are listed one by one, so that some of them can be left unopened.
"""

import json
from collections.abc import Collection, Iterator
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from msgspec.structs import replace

from pipeline.data.ingest.image_policy import ImagePolicy
from pipeline.data.sources.base import (
    ListedTar,
    Record,
    Reject,
    Source,
    TarSource,
    accounted,
    fingerprint,
)
from pipeline.data.sources.columns import ColumnarSource, accounted_batches, in_batches
from pipeline.data.sources.digests import digests, in_hex
from pipeline.data.tars.foreign_tar import ForeignTar
from pipeline.digest import digest_of
from pipeline.errors import ConfigError, SourceError
from pipeline.look_ahead import map_ahead

# `metadata`: what the source tells images apart by without opening them: size, modification
# time, an object's version. `content`: a digest of every image's bytes, read in each run.
FingerprintOf = Literal["metadata", "content"]

STAYS_AS_IT_IS = (
    "reencode: images of a webdataset source that are read in place cannot be encoded anew; set "
    "its `in_place: false`, which copies them, or leave `reencode` out"
)

_READS_AT_ONCE = 16


class SourceView:
    """A source under the settings of an ingest. Reading images stays the source's own.

    `unopened` tars of the source are not listed.
    """

    def __init__(
        self,
        source: Source,
        policy: ImagePolicy,
        fingerprint: FingerprintOf,
        unopened: Collection[ForeignTar] = (),
    ) -> None:
        self._source = source
        self._policy = policy
        self._by_content = fingerprint == "content"
        self._unopened = unopened

    def tars(self) -> list[ForeignTar]:
        """Returns the tars whose images stay in them, and that may be left unopened.

        There are none if the bytes of all images are asked for, or other sources have a say.
        """
        if self._by_content or not isinstance(self._source, TarSource):
            return []
        if not self._source.in_place:
            return []
        return [self._under_settings(listed_tar.tar) for listed_tar in self._source.tars()]

    def records(self) -> Iterator[Record | Reject]:
        """Lists what the source lists, in its order.

        Raises ConfigError if an image that stays in its tar is to be encoded anew.
        """
        if isinstance(self._source, TarSource) and self._source.in_place:
            for listed_tar in self._source.tars():
                if self._under_settings(listed_tar.tar) not in self._unopened:
                    yield from self._of_tar(self._source, listed_tar)
        else:
            yield from self._as_wanted(accounted(self._source))

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Lists what `records` does, by columns where the source does and nothing is against it."""
        one_by_one = self._by_content or self._policy.filters.has_caption_rule
        if one_by_one or not isinstance(self._source, ColumnarSource):
            yield from in_batches(self.records())
            return
        identity = self._policy.identity()
        for batch in accounted_batches(self._source):
            yield self._treated_batch(batch, identity) if identity else batch

    def _treated_batch(self, batch: pa.RecordBatch, identity: str) -> pa.RecordBatch:
        is_record = pc.is_null(batch.column("reason"))
        images = pc.binary_join_element_wise(batch.column("image_fingerprint"), identity, " ")
        treated = pc.if_else(is_record, in_hex(digests(images)), batch.column("image_fingerprint"))
        names = batch.column("suffix").dictionary_encode()
        suffixes = [self._policy.suffix(name) for name in names.dictionary.to_pylist()]
        suffix = pa.array(suffixes, pa.string()).take(names.indices)
        columns = {"image_fingerprint": treated, "suffix": suffix}
        return pa.record_batch(
            [columns.get(name, batch.column(name)) for name in batch.schema.names], batch.schema
        )

    def _of_tar(self, source: TarSource, listed_tar: ListedTar) -> list[Record | Reject]:
        """Returns the records of a tar, which says how many there are."""
        found = list(self._as_wanted(source.samples(listed_tar)))
        tar = replace(self._under_settings(listed_tar.tar), num_records=len(found))
        return [replace(entry, tar=tar) for entry in found]

    def _under_settings(self, tar: ForeignTar) -> ForeignTar:
        settings = [tar.listing, self._policy.identity()]
        settings.append(self._policy.filters.model_dump_json())
        return replace(tar, listing=digest_of(json.dumps(settings).encode()))

    def _as_wanted(self, entries: Iterator[Record | Reject]) -> Iterator[Record | Reject]:
        if self._by_content:
            entries = self._fingerprinted(entries)
        identity, filters = self._policy.identity(), self._policy.filters
        if not identity and not filters.has_caption_rule:
            yield from entries
            return
        for entry in entries:
            if isinstance(entry, Record):
                if identity:
                    entry = self._treated(entry, identity)
                if filters.has_caption_rule:
                    entry = filters.captioned(entry)
            yield entry

    def read(self, record: Record) -> bytes:
        """Returns the image's bytes, as they come."""
        return self._source.read(record)

    def _treated(self, record: Record, identity: str) -> Record:
        if record.tar and self._policy.reencode is not None:
            raise ConfigError(f"dataset.ingest.{STAYS_AS_IT_IS}")
        return replace(
            record,
            suffix=self._policy.suffix(record.suffix),
            image_fingerprint=fingerprint(f"{record.image_fingerprint} {identity}"),
        )

    def _fingerprinted(self, entries: Iterator[Record | Reject]) -> Iterator[Record | Reject]:
        """Reads a few images at a time; an image that cannot be had is left to be found out."""
        return map_ahead(self._with_content, entries, _READS_AT_ONCE, 2 * _READS_AT_ONCE)

    def _with_content(self, entry: Record | Reject) -> Record | Reject:
        if isinstance(entry, Reject):
            return entry
        try:
            content = f"content {digest_of(self._source.read(entry))}"
            if entry.tar:  # the same bytes at another place are to be found there
                content += f" in {entry.image}"
        except SourceError:
            return entry
        return replace(entry, image_fingerprint=fingerprint(content))
