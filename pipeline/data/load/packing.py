"""Micro-batches under a budget of tokens and regions.

Tokens are those of texts and the regions of images, with their padding: what a forward pass costs
goes by them rather than by the number of samples. Which samples make a step, and which rank has
them, stays arithmetic on the step; micro-batches may hold different numbers of them, so that the
mean over the samples is that over micro-batches weighted by their samples.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from pipeline.data.tars.members import Int64Array


def cut_by_tokens(
    lengths: Sequence[Int64Array], max_tokens: int, max_samples: int
) -> list[tuple[Int64Array, ...]]:
    """Returns for each micro-batch, and each kind of text, indices in the share: shortest first.

    `lengths` has for each kind what an example takes in each of the passes over it, if it is not
    padded: (passes, B). A micro-batch holds as many examples of one kind as of another, so that one
    weight is right for all of them, and is one of each kind if even these are more than
    `max_tokens`. Within it indices rise; of equal lengths the first index comes first.
    """
    orders = [np.argsort(of_kind.sum(axis=0), kind="stable") for of_kind in lengths]
    ranked = np.concatenate(
        [of_kind[:, order] for of_kind, order in zip(lengths, orders, strict=True)]
    )
    num_examples = ranked.shape[1]
    bounds = [0]
    longest = ranked[:, 0]
    for end in range(1, num_examples):
        with_it = np.maximum(longest, ranked[:, end])
        count = end + 1 - bounds[-1]
        if count > max_samples or count * with_it.sum() > max_tokens:
            bounds.append(end)
            longest = ranked[:, end]
        else:
            longest = with_it
    bounds.append(num_examples)
    return [
        tuple(np.sort(order[start:stop]) for order in orders) for start, stop in pairwise(bounds)
    ]
