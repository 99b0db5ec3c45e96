"""Counting on shapes alone, against torch's counter watching a model that computes."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.families import build
from pipeline.models.flops import EncodingFlops
from tests.models.examples import batch, row
from tests.models.test_families import CONFIGS, every_family


@every_family
def test_a_sample_takes_what_torch_counts_while_it_is_encoded(family: str) -> None:
    config = CONFIGS[family]()
    inputs = row(batch((6, 4, 3), (2, 5, 3)), 1)
    model = build(config).eval()
    with (
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        model.encode(inputs)
    assert EncodingFlops(config).of(4, 5) == counter.get_total_flops() > 0


def test_a_longer_text_takes_more_and_a_large_model_no_memory() -> None:
    sizes = {"width": 4096, "num_heads": 32, "num_layers": 40, "intermediate_size": 16384}
    encoding = EncodingFlops(CONFIGS["visualbert"](**sizes))
    assert encoding.of(16, 36) > encoding.of(8, 36) > encoding.of(8, 0)
    weights = 40 * (4 * 4096 * 4096 + 2 * 4096 * 16384)  # six billion
    assert encoding.of(16, 36) == pytest.approx(2 * weights * 52, rel=0.01)
