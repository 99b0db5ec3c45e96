"""Floating-point operations of a training step, by model sizes and text lengths.

Per sample T tokens and R regions. Counted as `pipeline.models.flops` does, with the heads of
masked words and of matching.
"""

from collections.abc import Iterable

from pipeline.models.base import ModelConfig
from pipeline.models.flops import EncodingFlops


def step_flops(
    config: ModelConfig, lengths: Iterable[int], num_regions: int, masked_per_text: int
) -> int:
    """Returns the operations of forward and backward, which is twice the forward, of a batch."""
    encoding = EncodingFlops(config)
    words = masked_per_text * _linear(config.width, config.width + config.vocab_size)
    heads = words + _linear(config.width, 2)
    return 3 * sum(encoding.of(length, num_regions) + heads for length in lengths)


def _linear(inputs: int, outputs: int) -> int:
    return 2 * inputs * outputs
