from pathlib import Path

import pytest

from pipeline.cluster import ClusterConfig
from pipeline.errors import ConfigError
from pipeline.training.launch.launch import launch
from tests.training.stand_in import make_spec


def test_more_workers_than_processes_are_refused(tmp_path: Path) -> None:
    cluster = ClusterConfig(runner="process", workers=2)
    with pytest.raises(ConfigError, match=r"cluster.workers: found 2, but .* has 1 process"):
        launch(make_spec(tmp_path), cluster, print)
