"""The rows of records by what has become of them."""

from msgspec.structs import replace

from pipeline.data.manifest.schema import SampleRow, State
from pipeline.data.sources.base import Record
from pipeline.reason import Reason


def live_row(record: Record) -> SampleRow:
    """Returns a sample's row but for what is known of its image and of where it lies."""
    return SampleRow(
        key=record.key,
        split=record.split,
        state=State.LIVE,
        detail=record.detail,
        image_fingerprint=record.image_fingerprint,
        texts_fingerprint=record.texts_fingerprint,
        tar=record.tar,
        suffix=record.suffix,
        num_captions=record.texts.num_captions,
        num_questions=record.texts.num_questions,
        num_rounds=record.texts.num_rounds,
    )


def reject_row(record: Record, reason: Reason, detail: str, duplicate_of: str = "") -> SampleRow:
    """Returns the row of a record whose image cannot be, or shall not be, a sample's."""
    return replace(
        live_row(record),
        state=State.REJECT,
        reason=reason,
        detail=detail,
        duplicate_of=duplicate_of,
    )
