"""Fixtures of the tests of launches."""

import pytest

from pipeline.training.launch import ray_train
from tests.training import stand_in


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has ranks under Ray Train train the stand-in for the model and the data."""
    monkeypatch.setattr(ray_train, "_on_ray_worker", stand_in.ray_worker)
