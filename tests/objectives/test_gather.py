"""Gathering outside of a process group; inside one, see test_itc."""

import torch

from pipeline.objectives.gather import gathered, rank


def test_a_process_by_itself_is_the_first_of_one() -> None:
    local = torch.randn(2, 3, requires_grad=True)
    assert gathered(local) is local
    assert rank() == 0
