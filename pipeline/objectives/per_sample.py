"""Means per sample of values at some of its positions."""

import torch
from torch import Tensor


def mean_of_places(values: Tensor, places: Tensor) -> Tensor:
    """Maps values (N,), one for each True of places (B, P) in order, to means, float32 (B,).

    A sample's value is the mean over its own places, 0 if it has none. The usual mean over all
    places of a batch would weigh a sample by how many places the ones beside it have.
    """
    spread = torch.zeros(places.shape, dtype=torch.float32, device=places.device)
    spread[places] = values.float()
    return spread.sum(1) / places.sum(1).clamp(min=1)


def nan_where_none(means: Tensor, places: Tensor) -> Tensor:
    """Returns means (B,) with NaN for the samples that have no True in places (B, P)."""
    return means.masked_fill(~places.any(1), torch.nan)
