"""The unchanged re-run: a long listing, and a manifest that has it all.

Memory is that of a process of its own, which has only what an ingest needs: the bench runs
`python -m pipeline.perf.rerun URL RECORDS`, which prints JSON. Nothing here imports torch.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from msgspec.structs import replace

from pipeline.data.ingest.ingest import IngestConfig, ingest
from pipeline.data.ingest.outcome import live_row
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import SampleRow, to_table
from pipeline.data.sample import Texts
from pipeline.data.sources.base import Record, fingerprint
from pipeline.errors import PipelineError
from pipeline.perf.own_process import in_its_own_process, peak_bytes

_ROWS_AT_ONCE = 100_000
_SAMPLES_PER_SHARD = 1000
_IMAGE_BYTES, _TEXTS_BYTES = 65_000, 300


@dataclass(frozen=True)
class SyntheticListing:
    """Records with a caption each, made up as they are listed; there are no images."""

    num_records: int

    def records(self) -> Iterator[Record]:
        for number in range(self.num_records):
            texts = Texts(number, (f"A picture of number {number}, in colour.",))
            image = f"/images/{number:012d}.jpg"
            stamp = fingerprint(f"{image} 65000-1700000000")
            yield Record(f"{number:012d}", "train", image, "jpg", texts.encoded(), stamp)

    def read(self, record: Record) -> bytes:
        raise PipelineError(f"{record.key}: an unchanged run has opened an image")


@dataclass(frozen=True)
class Rerun:
    """What an unchanged run took, beside going through its listing alone."""

    listing_seconds: float
    seconds: float
    processor_seconds: float
    peak_bytes: int  # of the whole process


def measure_rerun(num_records: int, folder: Path) -> Rerun:
    """Lists the records in a manifest, then measures a run that finds them all there."""
    url = str(folder.absolute() / "dataset")
    _fill(url, num_records)
    return in_its_own_process("pipeline.perf.rerun", Rerun, url, num_records)


def _fill(url: str, num_records: int) -> None:
    manifest = Manifest.create(url)
    rows = []
    for number, record in enumerate(SyntheticListing(num_records).records()):
        shard, place = divmod(number, _SAMPLES_PER_SHARD)
        rows.append(
            replace(
                live_row(record),
                digest=f"{hash(record.key) % 2**64:032x}",
                shard=f"{shard:016x}",
                image_offset=place * (_IMAGE_BYTES + _TEXTS_BYTES),
                image_size=_IMAGE_BYTES,
                texts_shard=f"{shard:016x}",
                texts_offset=place * (_IMAGE_BYTES + _TEXTS_BYTES) + _IMAGE_BYTES,
                texts_size=_TEXTS_BYTES,
                width=640,
                height=480,
            )
        )
        if len(rows) == _ROWS_AT_ONCE or number == num_records - 1:
            manifest = manifest.commit(to_table(rows, SampleRow))
            rows = []


def _rerun(url: str, num_records: int) -> Rerun:
    listing = SyntheticListing(num_records)
    start = time.perf_counter()
    for _ in listing.records():
        pass
    listed = time.perf_counter()
    before = time.process_time()
    report = ingest(listing, url, IngestConfig(shards_in_flight=0))
    if report.num_unchanged != num_records:
        raise PipelineError(f"{report.num_unchanged} of {num_records} records were unchanged")
    return Rerun(
        listing_seconds=listed - start,
        seconds=time.perf_counter() - listed,
        processor_seconds=time.process_time() - before,
        peak_bytes=peak_bytes(),
    )


if __name__ == "__main__":
    print(json.dumps(asdict(_rerun(sys.argv[1], int(sys.argv[2])))))
