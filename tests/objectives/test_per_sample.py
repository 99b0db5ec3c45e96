"""One figure per sample from figures of its positions."""

import torch

from pipeline.objectives.per_sample import mean_per_sample, nan_where_none

MASK = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])


def test_a_samples_mean_is_of_its_own_positions() -> None:
    means = mean_per_sample(torch.tensor([1.0, 3.0, 5.0]), MASK)
    assert means.tolist() == [2.0, 0.0, 5.0]


def test_the_gradient_reaches_each_value() -> None:
    values = torch.tensor([1.0, 3.0, 5.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(mean_per_sample(values, MASK).sum(), values)
    assert gradient.tolist() == [0.5, 0.5, 1.0]


def test_a_sample_without_positions_is_told_apart_where_that_matters() -> None:
    means = nan_where_none(torch.tensor([2.0, 0.0, 5.0]), MASK)
    assert means.isnan().tolist() == [False, True, False]
