import urllib.request
from pathlib import Path

import pytest

from pipeline.cluster import ClusterConfig
from pipeline.training.launch.launch import launch
from tests.training.stand_in import make_spec, wait_until


@pytest.mark.usefixtures("ray_local", "stand_ins")
def test_its_figures_are_shown_to_prometheus(tmp_path: Path) -> None:
    import ray

    launch(make_spec(tmp_path / "birds" / "pretrain"), ClusterConfig(workers=2), print)
    node = ray.nodes()[0]
    page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    shown: list[str] = []

    def is_shown() -> bool:
        with urllib.request.urlopen(page, timeout=10) as answer:
            text = answer.read().decode()
        shown[:] = [line for line in text.splitlines() if 'run="birds"' in line]
        steps = [line for line in shown if line.startswith("ray_sightline_training_step{")]
        return any('phase="pretrain"' in line and line.endswith(" 8.0") for line in steps)

    wait_until(is_shown)  # Ray shows what was told to it every few seconds
    assert len(shown) >= 8
