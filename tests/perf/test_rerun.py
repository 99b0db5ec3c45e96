from pathlib import Path

import pytest

from pipeline.data.ingest.ingest import IngestConfig, ingest
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.sources.base import Record
from pipeline.data.upkeep.verify import verify
from pipeline.errors import PipelineError
from pipeline.perf.rerun import SyntheticListing, measure_rerun


@pytest.mark.processes
def test_a_run_over_what_is_there_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    took = measure_rerun(2500, tmp_path)
    assert 0 < took.listing_seconds < took.seconds
    assert took.processor_seconds > 0
    assert 50 * 2**20 < took.peak_bytes < 800 * 2**20
    manifest = Manifest.open(str(tmp_path / "dataset"))
    assert manifest.samples(["key"]).num_rows == 2500


@pytest.mark.processes
def test_a_listing_that_changed_would_open_an_image(tmp_path: Path) -> None:
    measure_rerun(3, tmp_path)
    with pytest.raises(PipelineError, match="has opened an image"):
        ingest(SyntheticListing(4), str(tmp_path / "dataset"), IngestConfig(shards_in_flight=0))


@pytest.mark.processes
def test_the_manifest_has_all_that_rows_of_samples_need(tmp_path: Path) -> None:
    measure_rerun(5, tmp_path)
    kinds = {fault.kind for fault in verify(str(tmp_path / "dataset")).faults}
    assert kinds == {"unreadable-file"}  # there are no shards, and no row is incomplete


def test_listings_are_the_same_each_time() -> None:
    records = list(SyntheticListing(3).records())
    assert records == list(SyntheticListing(3).records())
    assert len({record.image_fingerprint for record in records}) == 3
    assert all(isinstance(record, Record) for record in records)
