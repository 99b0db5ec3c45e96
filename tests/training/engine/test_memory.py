"""The bytes foretold against those that DeepSpeed's tensors really take."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.training.config import TrainingConfig
from pipeline.training.engine.engine import Engine
from pipeline.training.engine.memory import state_bytes
from pipeline.training.spec import RankContext
from tests.training.stand_in import make_spec

HERE = RankContext(rank=0, world_size=1, local_rank=0, device="cpu")
WIDTH = 256


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(4)])

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.layers(batch).float().pow(2).mean()
        return loss, {"only": loss.detach()}


def held_bytes() -> int:
    """Every tensor of this process, each storage once."""
    storages = {}
    for one in gc.get_objects():
        if type(one) in (Tensor, nn.Parameter) and not one.is_meta:  # none that torch only traces
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")],
)
def test_a_step_holds_as_many_bytes_as_foretold(
    stage: int, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what earlier tests left for the collector would be taken for freed by the engine
    gc.collect()
    before = held_bytes()
    settings: Any = {"zero_stage": stage, "precision": precision, "optimizer": {"ema_decay": 0.9}}
    config = make_spec(tmp_path, **settings).training
    module = Layers()
    count = sum(parameter.numel() for parameter in module.parameters())
    engine = Engine(module, config, HERE)
    seen = []
    step = torch.optim.AdamW.step

    def watched(self: Any, *arguments: Any, **named: Any) -> Any:
        seen.append(held_bytes())
        return step(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    batch = torch.randn(2, WIDTH, dtype=engine.dtype)
    for _ in range(2):
        engine.advance([batch] * 4)
    engine.close()
    foretold = state_bytes(config, HERE, count, count)
    assert foretold.offloaded == 0
    assert seen
    assert (max(seen) - before) / foretold.device == pytest.approx(1, abs=0.05)


def test_ranks_share_what_the_stage_cuts_up() -> None:
    eight = RankContext(rank=0, world_size=8, local_rank=0, device="cuda:0")

    def of(stage: int, **more: Any) -> tuple[int, int]:
        config = TrainingConfig(
            steps=1, global_batch_size=8, micro_batch_size=1, zero_stage=stage, **more
        )
        found = state_bytes(config, eight, 1_000_000, 1_000_000)
        return found.device, found.offloaded

    assert of(0, precision="fp32") == (16_000_000, 0)
    # bf16 weights and gradients whole, an eighth of 12 bytes of optimizer a parameter
    assert of(1) == (2_000_000 + 2_000_000 + 1_500_000, 0)
    assert of(1)[0] > of(2, deepspeed={"zero_optimization": {"reduce_bucket_size": 4096}})[0]
    small = {"reduce_bucket_size": 4096}
    assert of(3, deepspeed={"zero_optimization": small}) == (250_000 + 1_500_000 + 758_192, 0)
    offload = {**small, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    on_device, elsewhere = of(3, deepspeed={"zero_optimization": offload})
    assert on_device < 300_000
    assert elsewhere == 250_000 + 1_500_000 + 500_000
