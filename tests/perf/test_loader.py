"""The bench as a whole, in the size that only shows that it runs."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ConfigError, PipelineError
from pipeline.perf import loader, loader_data, loader_peers
from pipeline.perf.loader import LoaderBenchConfig
from pipeline.perf.result import Comparison


@pytest.mark.processes
def test_ratios_are_those_of_its_own_figures_and_nothing_is_left(tmp_path: Path) -> None:
    config = LoaderBenchConfig(
        samples=300,
        images=9,
        dim=8,
        image_size=16,
        batch_size=7,
        threads=2,
        rounds=1,
        folder=str(tmp_path),
    )
    shown: list[Comparison] = []
    result = loader.run(config, shown.append)
    assert list(tmp_path.iterdir()) == []
    assert shown == result.comparisons
    features, images = result.comparisons
    assert {loader.LIMIT, loader.LIMIT_AHEAD, loader.READS} < set(features.seconds)
    assert {loader.OURS, "webdataset"} < set(features.seconds)
    assert {loader.BARE, loader.SAME_CALLS, loader.OURS, "webdataset"} == set(images.seconds)
    for comparison, reference in ((features, loader.LIMIT), (images, loader.BARE)):
        seconds = comparison.seconds
        ours = seconds[loader.OURS]
        assert comparison.figures[f"of {reference}"] == pytest.approx(seconds[reference] / ours)
        assert comparison.figures["by webdataset"] == pytest.approx(seconds["webdataset"] / ours)
        assert all(figure > 0 for figure in comparison.figures.values())
        notes = "\n".join(comparison.notes)
        assert f"times webdataset {loader_peers.installed('webdataset')}" in notes
    is_there = "litdata" in features.seconds
    assert ("litdata is absent: pip install" in "\n".join(features.notes)) != is_there


def test_a_peer_that_is_not_installed_has_no_version() -> None:
    assert loader_peers.installed("numpy") == np.__version__
    assert loader_peers.installed("no-such-package-of-ours") is None


def gives(*batches: np.ndarray) -> loader_peers.Epoch:
    return lambda: iter(batches)


def test_a_contestant_with_other_samples_makes_the_bench_void() -> None:
    whole = np.arange(6.0)
    epochs = {loader.OURS: gives(whole[:3], whole[3:]), "peer": gives(whole[::-1])}
    loader._check_same(epochs, 6, lambda batch: batch)
    for other in (whole[:5], whole + 1):
        with pytest.raises(PipelineError, match="peer gives other samples"):
            loader._check_same(epochs | {"peer": gives(other)}, 6, lambda batch: batch)


def test_photographs_are_drawn_or_come_from_a_folder(tmp_path: Path) -> None:
    drawn = loader_data.photographs(2, None)
    assert Image.open(io.BytesIO(drawn[1])).size == (640, 480)
    assert drawn[0] != drawn[1]
    for name in ("b.jpg", "a.JPEG", "c.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    assert loader_data.photographs(2, str(tmp_path)) == [b"a.JPEG", b"b.jpg"]
    with pytest.raises(ConfigError, match="found none"):
        loader_data.photographs(2, str(tmp_path / "empty"))
