"""Listed records as columns of Arrow.

A source that reads columns lists them as they are; what other sources list one by one is put into
columns here.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.sources.base import (
    IndexedSource,
    Record,
    Reject,
    Source,
    require_accounted,
    require_readable,
)

_ROWS_AT_ONCE = 8192

# What a record or a reject says. A reject has a reason, and no texts; its image is "".
LISTED = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("image", pa.string()),
        ("suffix", pa.string()),
        ("image_fingerprint", pa.string()),
        ("texts_fingerprint", pa.string()),
        ("texts", pa.binary()),  # canonical JSON
        ("num_captions", pa.int32()),
        ("num_questions", pa.int32()),
        ("num_rounds", pa.int32()),
        ("num_entries", pa.int32()),
        ("tar", pa.string()),  # that the image stays in, with its place there
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
    ]
)


def in_batches(entries: Iterable[Record | Reject]) -> Iterator[pa.RecordBatch]:
    """Yields what was listed one by one in batches of schema LISTED."""
    entries = iter(entries)
    while chunk := list(islice(entries, _ROWS_AT_ONCE)):
        yield pa.RecordBatch.from_pylist([*map(_columns_of, chunk)], LISTED)


def _columns_of(entry: Record | Reject) -> dict[str, object]:
    image, texts = entry.fingerprint.split("-")
    both = {
        "key": entry.key,
        "split": entry.split,
        "detail": entry.detail,
        "image_fingerprint": image,
        "texts_fingerprint": texts,
        "num_entries": entry.num_entries,
        "tar": entry.tar or None,
    }
    if isinstance(entry, Reject):
        return both | {"reason": entry.reason}
    return both | {
        "image": entry.image,
        "suffix": entry.suffix,
        "texts": entry.texts.to_json(),
        "num_captions": len(entry.texts.captions),
        "num_questions": len(entry.texts.questions),
        "num_rounds": entry.texts.num_rounds,
        "image_offset": entry.image_offset,
        "image_size": entry.image_size,
    }


@runtime_checkable
class ColumnarSource(Source, Protocol):
    """A source that lists columns at a fraction of what records cost."""

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Lists what `records` does, in batches of schema LISTED.

        The same but for the order of different keys, and what remains of a reject.
        """
        ...


def listed(source: Source) -> Iterator[pa.RecordBatch]:
    """Yields what a source lists in batches of schema LISTED."""
    if isinstance(source, ColumnarSource):
        yield from source.batches()
    else:
        yield from in_batches(source.records())


def accounted_batches(source: ColumnarSource) -> Iterator[pa.RecordBatch]:
    """Yields what a source lists, and raises SourceError if entries of its index are in nothing."""
    require_readable(source)
    num_entries = 0
    for batch in source.batches():
        num_entries += pc.sum(batch.column("num_entries")).as_py() or 0
        yield batch
    if isinstance(source, IndexedSource):
        require_accounted(source.index(), num_entries)
