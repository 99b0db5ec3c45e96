import socket

import pytest

from pipeline import config
from pipeline.cluster import ClusterConfig, start_ray
from pipeline.errors import ConfigError, TrainingError


def test_a_range_of_workers_is_one_and_needs_nodes() -> None:
    assert list(ClusterConfig(workers=3).world_sizes()) == [3]
    assert list(ClusterConfig(workers=3, min_workers=1).world_sizes()) == [1, 2, 3]
    with pytest.raises(ConfigError, match="min_workers=3 is more than workers=2"):
        config.check(ClusterConfig, {"workers": 2, "min_workers": 3}, "cluster")
    with pytest.raises(ConfigError, match="loses and gains no nodes"):
        config.check(ClusterConfig, {"runner": "process", "min_workers": 1}, "cluster")


def test_an_address_has_no_use_in_one_process() -> None:
    with pytest.raises(ConfigError, match="no use for address"):
        config.check(ClusterConfig, {"runner": "process", "address": "auto"}, "cluster")


def test_an_address_where_no_ray_answers_is_named_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(TrainingError, match=f"no Ray answers at 127.0.0.1:{port}"):
        start_ray(ClusterConfig(address=f"127.0.0.1:{port}"))
