"""The unchanged re-run of a Parquet table, and the run that finds some rows inserted.

The table has keys, splits, captions and embedded images, as Hugging Face writes them; every image
is the same small one, which Parquet stores once. As in `rerun` a run is a process of its own:
`python -m pipeline.perf.table_rerun TABLE URL` prints JSON.
"""

import io
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from pipeline.data.ingest.ingest import IngestConfig, ingest
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import SAMPLES, State
from pipeline.data.sources.digests import digests, in_hex
from pipeline.data.sources.readers.text_columns import TextColumns
from pipeline.data.sources.table import TableSource, TableSourceConfig
from pipeline.errors import PipelineError
from pipeline.perf.own_process import in_its_own_process, peak_bytes

_ROWS_AT_ONCE = 100_000
_SAMPLES_PER_SHARD = 1000
_IMAGE_BYTES, _TEXTS_BYTES = 65_000, 300


@dataclass(frozen=True)
class TableRerun:
    """What a run took."""

    num_unchanged: int
    num_added: int
    seconds: float
    processor_seconds: float
    peak_bytes: int  # of the whole process


def table_source(table: Path) -> TableSource:
    """Returns the source of a folder that `write_table` has written to."""
    return TableSource(
        TableSourceConfig(
            type="table",
            table=str(table),
            image="image",
            key="key",
            split="split",
            texts=TextColumns(captions="caption"),
            image_suffix="png",
        )
    )


def write_table(table: Path, name: str, first: int, num_rows: int) -> None:
    """Writes a file of rows with numbers from `first` on."""
    table.mkdir(parents=True, exist_ok=True)
    payload = io.BytesIO()
    Image.new("RGB", (8, 6)).save(payload, "png")
    with pq.ParquetWriter(table / f"{name}.parquet", _part(0, 0, b"").schema) as writer:
        for start in range(first, first + num_rows, _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, first + num_rows)
            writer.write_table(_part(start, stop, payload.getvalue()))


def _part(start: int, stop: int, image: bytes) -> pa.Table:
    numbers = pa.array(np.arange(start, stop)).cast(pa.string())
    return pa.table(
        {
            "key": pc.binary_join_element_wise("photo-", pc.utf8_lpad(numbers, 12, "0"), ""),
            "split": pa.repeat("train", len(numbers)),
            "caption": pc.binary_join_element_wise(
                "A picture of number ", numbers, ", in colour.", ""
            ),
            "image": pa.repeat(pa.scalar(image, pa.binary()), len(numbers)),
        }
    )


def fill(table: Path, url: str) -> None:
    """Makes a manifest that has every row of a table, with shards that do not exist."""
    manifest = Manifest.create(url)
    number = 0
    for rows in _many(table_source(table).batches()):
        manifest = manifest.commit(_live(rows, number))
        number += rows.num_rows


def _many(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(each.num_rows for each in waiting) >= 10 * _ROWS_AT_ONCE:
            yield pa.Table.from_batches(waiting)
            waiting = []
    if waiting:
        yield pa.Table.from_batches(waiting)


def _live(rows: pa.Table, first: int) -> pa.Table:
    num_rows = rows.num_rows
    numbers = np.arange(first, first + num_rows)
    shard = pa.array([f"{n:016x}" for n in range(first // 1000, (first + num_rows) // 1000 + 1)])
    shards = shard.take(pa.array(numbers // _SAMPLES_PER_SHARD - first // _SAMPLES_PER_SHARD))
    place = numbers % _SAMPLES_PER_SHARD * (_IMAGE_BYTES + _TEXTS_BYTES)
    digest = in_hex(digests(rows["key"].combine_chunks()))
    values = {name: rows[name] for name in rows.column_names} | {
        "state": pa.repeat(State.LIVE.value, num_rows),
        "digest": pc.binary_join_element_wise(digest, digest, ""),
        "shard": shards,
        "texts_shard": shards,
        "image_offset": place,
        "image_size": pa.repeat(_IMAGE_BYTES, num_rows),
        "texts_offset": place + _IMAGE_BYTES,
        "texts_size": pa.repeat(_TEXTS_BYTES, num_rows),
        "width": pa.repeat(640, num_rows),
        "height": pa.repeat(480, num_rows),
    }
    columns = {
        name: values.get(name, pa.nulls(num_rows, SAMPLES.field(name).type))
        for name in SAMPLES.names
    }
    return pa.table(columns).cast(SAMPLES)


def measure(table: Path, url: str) -> TableRerun:
    """Ingests the table into a dataset in a process of its own."""
    return in_its_own_process("pipeline.perf.table_rerun", TableRerun, table, url)


def measure_table_rerun(
    num_records: int, num_inserted: int, folder: Path
) -> tuple[TableRerun, TableRerun, TableRerun]:
    """Returns what an unchanged run takes, one that finds rows inserted, and these rows alone.

    `folder` is filled: 150 bytes a record.
    """
    table, alone = folder / "table", folder / "alone"
    url = str(folder.absolute() / "dataset")
    write_table(table, "a", 0, num_records)
    fill(table, url)
    unchanged = measure(table, url)
    if unchanged.num_unchanged != num_records:
        raise PipelineError(f"{unchanged.num_unchanged} of {num_records} rows were unchanged")
    for inserted in (table, alone):
        write_table(inserted, "b", num_records, num_inserted)
    return unchanged, measure(table, url), measure(alone, str(folder.absolute() / "of-alone"))


def _ingest(table: Path, url: str) -> TableRerun:
    start, before = time.perf_counter(), time.process_time()
    report = ingest(table_source(table), url, IngestConfig(shards_in_flight=0))
    return TableRerun(
        num_unchanged=report.num_unchanged,
        num_added=report.num_added,
        seconds=time.perf_counter() - start,
        processor_seconds=time.process_time() - before,
        peak_bytes=peak_bytes(),
    )


if __name__ == "__main__":
    print(json.dumps(asdict(_ingest(Path(sys.argv[1]), sys.argv[2]))))
