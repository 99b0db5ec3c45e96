from typing import Any

import pytest

from pipeline import cluster
from pipeline import resources as room
from pipeline.errors import ClusterError, ConfigError
from pipeline.resources import Waiting, wait


@pytest.fixture
def told(
    ray_local: None,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    """What is told of a cluster that was joined; it has two CPUs."""
    import ray

    told: list[str] = []
    address = ray.get_runtime_context().gcs_address
    monkeypatch.setattr(cluster.connection, "address", address)
    monkeypatch.setattr(cluster.connection, "tell", told.append)
    monkeypatch.setattr(room, "SECONDS_BETWEEN_CHECKS", 0.2)
    monkeypatch.setattr(room, "SECONDS_UNTIL_BUSY", 1.0)
    return told


def later(seconds: float) -> Any:
    import ray

    return ray.remote(num_cpus=2)(lambda: __import__("time").sleep(seconds))


def test_work_that_a_cluster_has_no_room_for_says_so_and_waits(told: list[str]) -> None:
    waiting = Waiting("pretrain", 3, {"CPU": 1, "GPU": 0})
    waiting.require_room()  # of a cluster that may get nodes, it is waited for
    for _ in range(3):
        waiting.tell_if_waiting(lambda: True)
    (said,) = told  # not again for a while
    assert said.startswith("pretrain: 3 x 1 CPU asked for, and the cluster at 127.0.0.1:")
    assert said.endswith(" has 2 CPU; it waits for nodes, which may come")
    gpus = Waiting("extract", 1, {"CPU": 1, "GPU": 1})
    gpus.tell_if_waiting(lambda: False)
    assert "extract: 1 x 1 CPU and 1 GPU asked for, and the cluster at" in told[1]
    assert "has 2 CPU and 0 GPU; it waits" in told[1]


def test_room_is_counted_by_node(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"CPU": 3.0}, {"CPU": 3.0, "GPU": 1.0}]
    monkeypatch.setattr(room, "_nodes", lambda: nodes)
    Waiting("pretrain", 2, {"CPU": 2, "GPU": 0}).tell_if_waiting(lambda: False)
    assert told == []
    Waiting("pretrain", 3, {"CPU": 2, "GPU": 0}).tell_if_waiting(lambda: False)
    assert "has 2 nodes: 3 CPU, 3 CPU; it waits" in told[0]


def test_work_that_waits_for_others_says_so(told: list[str]) -> None:
    import ray

    first, second = (later(4.0).remote() for _ in range(2))
    assert ray.wait([first], timeout=300)[0]
    assert wait([second], Waiting("ingest", 1, {"CPU": 2}), has_begun=False) == [second]
    assert len(told) == 1
    assert told[0].startswith("ingest: 1 x 2 CPU asked for, and others use the cluster, with ")
    told.clear()
    (third,) = wait([later(2.0).remote()], Waiting("ingest", 1, {"CPU": 2}), has_begun=True)
    assert ray.get(third) is None
    assert told == []


def test_a_ray_of_our_own_will_not_get_room(
    told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.connection, "address", "")
    Waiting("pretrain", 2, {"CPU": 1}).require_room()
    with pytest.raises(ConfigError, match="3 x 1 CPU asked for, and this machine has 2 CPU"):
        Waiting("pretrain", 3, {"CPU": 1}).require_room()
    assert told == []


def test_a_head_that_does_not_answer_was_lost(
    told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.connection, "address", "127.0.0.1:9")
    waiting = Waiting("pretrain", 99, {"CPU": 1})
    waiting.tell_if_waiting(lambda: True)  # for a moment
    monkeypatch.setattr(room, "SECONDS_UNTIL_LOST", 0.0)
    with pytest.raises(ClusterError, match=r"the Ray at 127.0.0.1:9 was lost: .* the same command"):
        waiting.tell_if_waiting(lambda: True)
    monkeypatch.setattr(cluster.connection, "silent_since", None)
    assert told == []
