"""The bench as a whole, in a size that only shows that it runs."""

from pathlib import Path

import pytest

from pipeline.config import check
from pipeline.errors import ConfigError
from pipeline.perf import ingest
from pipeline.perf.result import Comparison, Result


@pytest.fixture
def no_img2dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


@pytest.mark.usefixtures("no_img2dataset")
def test_contestants_write_everything_and_absent_peers_are_named(tmp_path: Path) -> None:
    shown: list[Comparison] = []
    config = ingest.IngestBenchConfig(images=5, records=50, rounds=1, folder=str(tmp_path))

    result: Result = ingest.run(config, shown.append)

    assert result.comparisons == shown
    plain, smaller, unchanged = shown
    assert {ingest.OURS, ingest.BARE, ingest.TAR, ingest.SHARD_WRITER} <= set(plain.seconds)
    assert all(seconds > 0 for seconds in plain.seconds.values())
    ratio = plain.seconds[ingest.TAR] / plain.seconds[ingest.OURS]
    assert plain.figures["times as fast as tar"] == pytest.approx(ratio)
    for comparison in (plain, smaller):
        assert any("pipx install img2dataset" in note for note in comparison.notes)
    assert "GNU tar" in plain.notes[0]
    assert "50 records" in unchanged.title
    assert unchanged.figures["peak_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match="images"):
        check(ingest.IngestBenchConfig, {"images": 0}, "bench ingest")
