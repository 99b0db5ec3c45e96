"""The bench as a whole, in the size that only shows that it runs."""

import pytest

from pipeline import config
from pipeline.errors import ConfigError
from pipeline.perf import train
from pipeline.perf.result import Comparison


@pytest.mark.slow
def test_every_part_of_a_run_is_timed() -> None:
    shown: list[Comparison] = []
    settings = config.check(train.TrainBenchConfig, {"size": "tiny", "rounds": 1}, "bench train")
    result = train.run(settings, shown.append)
    assert list(result.comparisons) == shown
    bare_0, bare_1, start_up, scaling, checkpoints = shown
    for comparison in (bare_0, bare_1):
        bare, ours = comparison.seconds["bare"], comparison.seconds["ours"]
        assert comparison.ratios["ours"] == pytest.approx(bare / ours)
        assert 0 < comparison.figures["cpu_ratio"] < 1.2
    whole = start_up.figures["whole"]
    parts = [seconds for name, seconds in start_up.figures.items() if name != "whole"]
    assert len(parts) == 7
    assert all(seconds >= 0 for seconds in parts)
    assert sum(parts) == pytest.approx(whole)
    one, two = scaling.seconds.values()
    assert scaling.figures["efficiency"] == pytest.approx(one / two)
    assert 0 < checkpoints.figures["seconds_waited"] < sum(checkpoints.seconds.values())
    assert result.machine["device"] == "cpu"


def test_a_size_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="size"):
        config.check(train.TrainBenchConfig, {"size": "huge"}, "bench train")
