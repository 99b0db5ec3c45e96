"""Extraction measured in the size that only shows that it runs, and its meters."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import check
from pipeline.errors import ConfigError
from pipeline.perf import extract as bench
from pipeline.perf.extract import BARE, OURS, CpuMeter, ExtractBenchConfig, further
from pipeline.perf.result import Comparison
from tests.vision.photo_dataset import picture

TINY = {
    "network": "squeezenet1_0",
    "node": "features.2",
    "images": 8,
    "batch_size": 3,
    "threads": 1,
    "rounds": 1,
    "pca_dims": 4,
    "ray": False,
}


def test_shares_are_those_of_its_own_figures_and_sizes_those_of_the_features() -> None:
    shown: list[Comparison] = []
    result = bench.run(ExtractBenchConfig.model_validate(TINY), shown.append)
    (found,) = result.comparisons
    assert shown == [found]
    assert found.figures["share_of_forward"] == pytest.approx(
        found.seconds[BARE] / found.seconds[OURS]
    )
    assert 0 <= found.figures["batch_invariance"] < 1e-4
    cells, dim = 54 * 54, 96
    assert found.figures["float16: bytes_per_image"] == cells * dim * 2
    assert found.figures["PCA 4 float16: bytes_per_image"] == cells * 4 * 2
    assert found.figures["int8: cosine"] > 0.99
    assert result.machine["threads"] == 1
    assert any("batch invariance" in note for note in found.notes)


def test_photographs_of_a_folder_are_taken_in_turn(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"p{number}.jpg").write_bytes(picture(number))
    images = bench._photographs(str(tmp_path), 5, tmp_path)
    assert list(images.values()) == [picture(number) for number in (0, 1, 2, 0, 1)]
    with pytest.raises(ConfigError, match=r"no \.jpg files"):
        bench._photographs(str(tmp_path / "none"), 5, tmp_path)


def test_what_starting_costs_is_in_neither_contestant() -> None:
    rounds = {"a few": (5.0, 6.0), "a all": (9.0, 8.0), "b few": (1.0, 1.0), "b all": (2.0, 2.0)}
    times = further(rounds, "ab")
    assert times.rounds == {"a": (4.0, 2.0), "b": (1.0, 1.0)}


@pytest.mark.processes
def test_cpu_time_of_processes_that_have_ended_is_counted() -> None:
    program = "import time\nwhile time.process_time() < 1: pass"

    def work() -> None:
        subprocess.run([sys.executable, "-c", program], check=True)

    with CpuMeter() as meter:
        for call in meter.metered({"work": work}).values():
            call()
            call()
    (seconds,) = meter.rounds()["work"]
    assert 0.5 < seconds < 5


@pytest.mark.parametrize("change", [{"images": 3}, {"storage": "zip"}, {"rounds": 0}], ids=str)
def test_a_wrong_setting_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        check(ExtractBenchConfig, TINY | change, "bench extract")


@pytest.mark.slow
def test_whole_runs_are_compared_with_ray_data() -> None:
    result = bench.run(ExtractBenchConfig.model_validate(TINY | {"ray": True}), lambda _: None)
    found = result.comparisons[1]
    assert set(found.seconds) == {bench.RAY_DATA, bench.RAY_DATA_ALL, bench.OURS_ON_RAY}
    assert np.isfinite(list(found.figures.values())).all()
