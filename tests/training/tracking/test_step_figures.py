import math

import pytest
import torch

from pipeline.training.tracking.step_figures import RankFigures, gather

MINE = RankFigures(
    num_samples=3,
    num_tokens=9,
    num_tokens_with_padding=12,
    flops=7.0,
    wait_seconds=0.5,
    stop=True,
    lost=False,
    written=True,
)


@pytest.mark.usefixtures("alone")
def test_means_are_weighted_and_a_figure_that_is_not_finite_is_named() -> None:
    losses = [
        (torch.tensor(1.0), {"itm": torch.tensor(0.25), "mlm": torch.tensor(0.75)}),
        (torch.tensor(3.0), {"mlm": torch.tensor(2.0), "itm": torch.tensor(1.0)}),
    ]
    found = gather(losses, [0.75, 0.25], 2.0, MINE, can_lower_loss_scale=False)
    assert (found.loss, found.losses) == (1.5, {"itm": 0.4375, "mlm": 1.0625})
    assert (found.num_samples, found.num_tokens, found.num_tokens_with_padding) == (3, 9, 12)
    assert (found.flops, found.wait_seconds) == (7.0, 0.5)
    assert (found.stop, found.lost, found.written, found.fault) == (True, False, True, None)
    losses[1][1]["itm"].fill_(math.nan)
    fault = gather(losses, [0.75, 0.25], 2.0, MINE, can_lower_loss_scale=False).fault
    assert fault == "rank 0: itm is nan"


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("can_lower", "fault"), [(True, None), (False, "the gradient's norm is inf")]
)
def test_a_gradient_too_large_is_no_fault_where_the_loss_scale_can_be_lowered(
    can_lower: bool, fault: str | None
) -> None:
    losses = [(torch.tensor(1.0), {"mlm": torch.tensor(1.0)})]
    assert gather(losses, [1.0], math.inf, MINE, can_lower).fault == fault
