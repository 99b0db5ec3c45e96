from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.perf.scale_data import ScaleData
from pipeline.perf.scale_steps import Opened, take


def test_a_step_has_a_process_of_its_own(tmp_path: Path) -> None:
    data = ScaleData(tmp_path, num_samples=600, num_shards=8)
    data.write()
    took = take("open", Opened, data.url)
    assert took.processor_seconds > 0
    assert 0 < took.peak_bytes < 500 * 2**20


def test_a_step_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no manifest here"):
        take("open", Opened, tmp_path / "nothing")
