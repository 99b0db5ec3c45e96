"""Listed records as columns of Arrow.

A source that reads columns lists them as they are; what other sources list one by one is put into
columns here.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Protocol, runtime_checkable

import pyarrow as pa

from pipeline.data.sources.base import Record, Reject, Source

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
    }


@runtime_checkable
class ColumnarSource(Source, Protocol):
    """A source that lists columns at a fraction of what records cost."""

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Lists what `records` does, in batches of schema LISTED.

        The same but for the order of different keys, and what remains of a reject.
        """
        ...
