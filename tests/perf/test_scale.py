"""The bench as a whole, in a size that only shows that it runs."""

import sys
from pathlib import Path

from pipeline.perf import scale
from pipeline.perf.result import Comparison, Goals


def test_every_figure_has_a_goal_and_absent_peers_are_named(tmp_path: Path) -> None:
    shown: list[Goals | Comparison] = []
    config = scale.ScaleBenchConfig(
        samples=600, shards=20, inserted=50, peers=sys.executable, folder=str(tmp_path)
    )

    result = scale.run(config, shown.append)

    (peers,), goals = result.comparisons, result.goals
    assert shown == [goals, peers]
    assert goals is not None
    assert all(figure.found > 0 and figure.goal > 0 for figure in goals.figures)
    assert {"s", "MB", "MiB"} <= {figure.unit for figure in goals.figures}
    assert scale.OURS in peers.seconds
    told = peers.notes[-1]
    assert all(name in peers.seconds or name in told for name in scale.PEERS)
    assert list(tmp_path.iterdir()) == []
