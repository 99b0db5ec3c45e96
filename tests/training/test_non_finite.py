from typing import Any

import pytest

from pipeline.training.checkpoints.run_state import RunState
from pipeline.training.non_finite import advice, reaction
from tests.training.stand_in import make_spec


@pytest.mark.parametrize(
    ("settings", "state", "action", "because"),
    [
        ({}, RunState(skips_in_a_row=1), "stop", ""),
        ({"not_finite": "skip"}, RunState(skips_in_a_row=5), "skip", ""),
        (
            {"not_finite": "skip"},
            RunState(skips_in_a_row=6),
            "stop",
            ", and 5 steps before it were skipped",
        ),
        ({"not_finite": "roll_back"}, RunState(roll_backs=2), "roll_back", ""),
        (
            {"not_finite": "roll_back"},
            RunState(roll_backs=3),
            "stop",
            ", and the run was rolled back 3 times before",
        ),
    ],
)
def test_the_config_says_what_is_done_and_how_often(
    settings: dict[str, Any], state: RunState, action: str, because: str
) -> None:
    found = reaction(make_spec("run", **settings).training, state)
    assert (found.action, found.because) == (action, because)


def test_the_advice_names_keys_and_where_the_run_goes_on() -> None:
    spec = make_spec("run", optimizer={"learning_rate": 0.5}, precision="bf16")
    told = advice(spec, "cpu", [3, 6])
    assert "`training.pretrain.optimizer.learning_rate=0.25`" in told
    assert "training.pretrain.precision=fp32" in told
    assert told.endswith("it goes on from the checkpoint at step 6")
    spec = make_spec("run", precision="fp32")
    told = advice(spec, "cpu", [])
    assert "precision" not in told
    assert told.endswith("there is no checkpoint yet, so it starts anew")
