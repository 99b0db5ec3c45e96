"""Which objective a step trains."""

from collections import Counter

import pytest

from pipeline.objectives.turns import Turns

SHARES = {"itm": 2.0, "mlm": 2.0, "mrm": 1.0}


def chosen(step: int, seed: int = 7, shares: dict[str, float] = SHARES) -> str:
    (name,) = [name for name in shares if Turns(name, shares).has(seed, step)]
    return name


def test_each_step_trains_exactly_one_in_proportion_to_its_share() -> None:
    counts = Counter(chosen(step) for step in range(2000))
    for name, share in SHARES.items():
        assert counts[name] / 2000 == pytest.approx(share / 5, abs=0.03)


def test_the_choice_is_a_function_of_seed_and_step_and_not_of_the_order_or_unit_of_shares() -> None:
    turned = {name: 10 * SHARES[name] for name in reversed(SHARES)}
    steps = range(200)
    assert [chosen(step) for step in steps] == [chosen(step, shares=turned) for step in steps]
    assert [chosen(step) for step in steps] != [chosen(step, seed=8) for step in steps]
