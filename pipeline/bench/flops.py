"""Model sizes and text lengths to floating-point operations: what a step must compute, by shapes.

Only matrix products count, two operations for each multiplication and addition, of real tokens and
regions: what is spent on padding, or on recomputing, is not useful. Per sample T tokens, R regions.
"""

from collections.abc import Iterable

from pipeline.models.base import ModelConfig
from pipeline.models.lxmert import LxmertConfig
from pipeline.models.visualbert import VisualBertConfig

# Operations per second at best, dense, by a part of the device's name: bf16, fp32 (vendors' data).
PEAKS = {
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "A10": (125e12, 31.2e12),
}


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Returns a device's best, or None if it is not in the table. fp32 is without TF32."""
    for name, (bf16, fp32) in PEAKS.items():
        if name in device_name:
            return bf16 if dtype == "bf16" else fp32
    return None


def step_flops(
    config: ModelConfig, lengths: Iterable[int], num_regions: int, masked_per_text: int
) -> int:
    """Returns the operations of forward and backward, which is twice the forward, of a batch."""
    head = masked_per_text * _linear(config.width, config.width + config.vocab_size)
    pooler = _linear(config.width, config.width + 2)
    return 3 * sum(_encoder(config, length, num_regions) + head + pooler for length in lengths)


def _encoder(config: ModelConfig, num_tokens: int, num_regions: int) -> int:
    if isinstance(config, LxmertConfig):
        return _lxmert(config, num_tokens, num_regions)
    assert isinstance(config, VisualBertConfig), config
    return _visualbert(config, num_tokens, num_regions)


def _visualbert(config: VisualBertConfig, num_tokens: int, num_regions: int) -> int:
    feature_dim = config.feature_dim + config.position_fourier
    embedding = num_regions * _linear(feature_dim, config.width)
    return embedding + config.num_layers * _layer(config, num_tokens + num_regions)


def _lxmert(config: LxmertConfig, num_tokens: int, num_regions: int) -> int:
    embedding = num_regions * _linear(config.feature_dim + 4, config.width)
    text = (config.text_layers + config.cross_layers) * _layer(config, num_tokens)
    regions = (config.region_layers + config.cross_layers) * _layer(config, num_regions)
    projections = (num_tokens + num_regions) * _linear(config.width, 4 * config.width)
    reading = 2 * _reading(config, num_tokens, num_regions)
    return embedding + text + regions + config.cross_layers * (projections + reading)


def _layer(config: ModelConfig, num_places: int) -> int:
    """Self-attention and feed-forward."""
    width, inner = config.width, config.intermediate_size
    maps = num_places * (_linear(width, 4 * width) + 2 * _linear(width, inner))
    return maps + _reading(config, num_places, num_places)


def _reading(config: ModelConfig, queries: int, keys: int) -> int:
    """Scores and their weighted sum."""
    return 2 * _linear(queries * config.width, keys)


def _linear(inputs: int, outputs: int) -> int:
    return 2 * inputs * outputs
