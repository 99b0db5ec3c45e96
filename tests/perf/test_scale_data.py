from pathlib import Path

from pipeline.data.ingest.ingest import IngestConfig, ingest
from pipeline.data.read.dataset import Dataset
from pipeline.data.sample import Texts
from pipeline.perf.scale_data import SPLIT, ScaleData, table_source, write_table

IN_THIS_PROCESS = IngestConfig(shards_in_flight=0)


def test_a_run_over_the_table_finds_every_record_as_it_is(tmp_path: Path) -> None:
    data = ScaleData(tmp_path, num_samples=70, num_shards=8)
    data.write()
    report = ingest(table_source(data.table), data.url, IN_THIS_PROCESS)
    assert (report.num_listed, report.num_unchanged, report.num_live) == (70, 70, 70)


def test_records_that_are_added_are_written_alone(tmp_path: Path) -> None:
    data = ScaleData(tmp_path, num_samples=70, num_shards=8)
    data.write()
    write_table(data.table / "1.parquet", [1, 3, 75])
    report = ingest(table_source(data.table), data.url, IN_THIS_PROCESS)
    assert (report.num_unchanged, report.num_added, report.num_live) == (70, 3, 73)


def test_every_shard_can_be_read(tmp_path: Path) -> None:
    data = ScaleData(tmp_path, num_samples=70, num_shards=8)
    data.write()
    split = Dataset.open(data.url).split(SPLIT)
    assert len(split.shard_starts) - 1 == 8
    assert len(set(split.each_key())) == 70
    found = split.texts(range(70), "captions")
    assert len(found) == 70
    assert all(isinstance(texts, Texts) and len(texts.captions) == 1 for texts in found)
