"""Manifest rows by what has become of a record."""

from typing import Any

from pipeline.data.manifest.manifest import LIVE, REJECT
from pipeline.data.sample import Texts
from pipeline.data.sources.base import Record

Row = dict[str, Any]


def record_of(change: Row) -> Record:
    """Returns the record of a row of `CHANGED`."""
    return Record(
        key=change["key"],
        split=change["split"],
        image=change["image"],
        suffix=change["suffix"],
        texts=Texts.from_json(change["texts"]),
        fingerprint=change["fingerprint"],
        detail=change["detail"],
        tar=change["tar"] or "",
        image_offset=change["image_offset"],
        image_size=change["image_size"],
    )


def live_row(record: Record) -> Row:
    """Returns the part of a sample's row that does not say where the sample lies."""
    return {
        "key": record.key,
        "split": record.split,
        "state": LIVE,
        "reason": "",
        "detail": record.detail,
        "fingerprint": record.fingerprint,
        "tar": record.tar or None,
        "suffix": record.suffix,
        "num_captions": len(record.texts.captions),
        "num_questions": len(record.texts.questions),
        "num_rounds": record.texts.num_rounds,
    }


def reject_row(record: Record, reason: str, detail: str, duplicate_of: str | None = None) -> Row:
    """Returns the row of a record whose image cannot be, or shall not be, a sample's."""
    why = {"state": REJECT, "reason": reason, "detail": detail}
    return live_row(record) | why | {"duplicate_of": duplicate_of}
