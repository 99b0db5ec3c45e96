"""Listed records as columns of Arrow.

A source that reads columns lists them as they are; what other sources list one by one is put into
columns here.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Protocol, runtime_checkable

import msgspec
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

_TAR = pa.struct(
    [
        ("location", pa.string()),
        ("stamp", pa.string()),
        ("listing", pa.string()),
        ("num_records", pa.int64()),
    ]
)

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
        ("tar", _TAR),  # that the image stays in, with its place there
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
    both = {
        "key": entry.key,
        "split": entry.split,
        "detail": entry.detail,
        "image_fingerprint": entry.image_fingerprint,
        "texts_fingerprint": entry.texts_fingerprint,
        "num_entries": entry.num_entries,
        "tar": msgspec.to_builtins(entry.tar),
    }
    if isinstance(entry, Reject):
        return both | {"reason": entry.reason}
    return both | {
        "image": entry.image,
        "suffix": entry.suffix,
        "texts": entry.texts.payload,
        "num_captions": entry.texts.num_captions,
        "num_questions": entry.texts.num_questions,
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
