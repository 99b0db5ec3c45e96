import math

import pytest

from pipeline.errors import ConfigError
from pipeline.training.checkpoints.run_state import RunState
from tests.training.stand_in import make_spec


def evaluate(*figures: float, best_is: str = "lowest") -> RunState:
    config = make_spec("run", evaluation={"every_steps": 1, "best_is": best_is}).training
    run_state = RunState()
    for step, figure in enumerate(figures, start=1):
        run_state = run_state.after_update().after_evaluation(step, {"loss": figure}, config)
    return run_state


@pytest.mark.parametrize(
    ("best_is", "figures", "best_step", "waited"),
    [
        ("lowest", (2.0, 1.0, 3.0, 1.0), 2, 2),
        ("highest", (2.0, 1.0, 3.0, 1.0), 3, 1),
        ("lowest", (math.nan, 5.0), 2, 0),
        ("lowest", (5.0, -math.inf, math.nan), 1, 2),
    ],
)
def test_an_evaluation_is_the_best_if_none_before_was_as_good(
    best_is: str, figures: tuple[float, ...], best_step: int, waited: int
) -> None:
    run_state = evaluate(*figures, best_is=best_is)
    assert (run_state.best_step, run_state.evaluations_since_best) == (best_step, waited)
    assert run_state.best == figures[best_step - 1]
    assert run_state.is_best(best_step)
    assert not run_state.is_best(len(figures) + 1)


def test_patience_is_spent_after_so_many_evaluations_without_a_better_one() -> None:
    config = make_spec("run", evaluation={"every_steps": 1, "patience": 2}).training
    assert not evaluate(1.0, 2.0).is_patience_spent(config)
    assert evaluate(1.0, 2.0, 2.0).is_patience_spent(config)
    assert not evaluate(1.0, 2.0, 2.0).is_patience_spent(make_spec("run").training)


def test_skips_in_a_row_end_with_an_update_and_an_evaluation_is_of_one_step() -> None:
    run_state = evaluate(1.0).after_skip().after_skip()
    assert (run_state.skips_in_a_row, run_state.evaluation) == (2, {})
    assert run_state.after_update().skips_in_a_row == 0


def test_a_figure_that_no_evaluation_gives_is_named_with_those_there_are() -> None:
    config = make_spec("run", evaluation={"every_steps": 1, "best_by": "bleu"}).training
    with pytest.raises(ConfigError, match="found 'bleu', but an evaluation gives itm, loss"):
        RunState().after_evaluation(1, {"loss": 1.0, "itm": 0.5}, config)
