"""Means per sample of values at some of its positions."""

import torch
from torch import Tensor


def mean_per_sample(values: Tensor, mask: Tensor) -> Tensor:
    """Maps values (N,), one for each True of mask (B, P) in order, to means, float32 (B,).

    A sample's value is the mean over its own positions, 0 if it has none. The usual mean over all
    positions of a batch would weigh a sample by how many of them the samples beside it have.
    """
    spread = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    spread[mask] = values.float()
    return spread.sum(1) / mask.sum(1).clamp(min=1)


def nan_where_none(means: Tensor, mask: Tensor) -> Tensor:
    """Returns means (B,) with NaN for the samples that have no True in mask (B, P)."""
    return means.masked_fill(~mask.any(1), torch.nan)
