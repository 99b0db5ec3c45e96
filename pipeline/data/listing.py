"""A source's records as a recipe wants them: what is compared with the manifest.

Captions of unwanted length are gone, and fingerprints tell what the recipe wants told: also of
the settings that images are treated by, and of the images' bytes where it asks for that.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

from pipeline.data.sources.base import Record, Reject, Source, with_image
from pipeline.data.treatment import Treatment, digest
from pipeline.errors import SourceError

# `metadata`: what the source tells images apart by without opening them: size, modification
# time, an object's version. `content`: a digest of every image's bytes, read in each run.
FingerprintOf = Literal["metadata", "content"]

_READS_AT_ONCE = 16


class Listing:
    """A source under the settings of an ingest. Reading images stays the source's own."""

    def __init__(self, source: Source, treatment: Treatment, fingerprint: FingerprintOf) -> None:
        self._source = source
        self._treatment = treatment
        self._by_content = fingerprint == "content"

    def records(self) -> Iterator[Record | Reject]:
        """Lists what the source lists, in its order."""
        entries = self._source.records()
        if self._by_content:
            entries = self._fingerprinted(entries)
        identity, filters = self._treatment.identity(), self._treatment.filters
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
        image = f"{record.fingerprint.partition('-')[0]} {identity}"
        return replace(
            record,
            suffix=self._treatment.suffix(record.suffix),
            fingerprint=with_image(image, record.fingerprint),
        )

    def _fingerprinted(self, entries: Iterator[Record | Reject]) -> Iterator[Record | Reject]:
        """Reads a few images at a time; an image that cannot be had is left to be found out."""
        waiting: deque[Future[Record | Reject]] = deque()
        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            try:
                for entry in entries:
                    waiting.append(pool.submit(self._with_content, entry))
                    if len(waiting) > 2 * _READS_AT_ONCE:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _with_content(self, entry: Record | Reject) -> Record | Reject:
        if isinstance(entry, Reject):
            return entry
        try:
            content = f"content {digest(self._source.read(entry))}"
        except SourceError:
            return entry
        return replace(entry, fingerprint=with_image(content, entry.fingerprint))
