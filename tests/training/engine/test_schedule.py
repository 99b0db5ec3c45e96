import pytest

from pipeline.training.config import ScheduleConfig
from pipeline.training.engine.schedule import rate_factor


def factors(**settings: object) -> list[float]:
    config = ScheduleConfig.model_validate({"warmup_steps": 4, **settings})
    return [rate_factor(config, 8, step) for step in range(8)]


def test_the_warm_up_wastes_no_step_and_the_linear_decay_ends_above_zero() -> None:
    assert factors(decay="linear") == [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]


def test_the_cosine_decay_is_half_way_down_in_its_middle() -> None:
    assert factors(decay="cosine")[4] == 1
    assert factors(decay="cosine")[6] == pytest.approx(0.5)
    assert factors(decay="cosine")[7] == pytest.approx(0.1464466)


def test_a_constant_rate_stays_at_its_peak() -> None:
    assert factors(decay="constant", warmup_steps=0) == [1] * 8


def test_a_warm_up_may_take_the_whole_run() -> None:
    assert factors(warmup_steps=8)[-1] == 1
