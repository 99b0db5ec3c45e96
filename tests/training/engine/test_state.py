from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.training.engine.engine import Engine
from pipeline.training.spec import RankContext
from tests.training.engine.test_engine import advance
from tests.training.stand_in import make_spec, stand_in

HERE = RankContext(rank=0, world_size=1, local_rank=0, device="cpu")


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_frozen_parameter_stays_and_has_no_moments(tmp_path: Path, stage: int) -> None:
    spec = make_spec(tmp_path, zero_stage=stage, precision="fp32")
    module = stand_in(spec).module
    frozen = dict(module.named_parameters())["hidden.weight"].requires_grad_(False)
    before = frozen.detach().clone()
    engine = Engine(module, spec.training, HERE)
    advance(engine, spec, 0, 2)
    states = {name: tensor.clone() for name, tensor in engine.states()}
    engine.close()
    assert torch.equal(states["weight/hidden.weight"], before)
    assert "exp_avg/hidden.weight" not in states
    assert "exp_avg/hidden.bias" in states


@pytest.mark.usefixtures("alone")
def test_the_weights_are_the_modules_state_dict_in_fp32(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, zero_stage=3, precision="bf16")
    module = stand_in(spec).module
    expected: dict[str, Tensor] = {k: v.clone() for k, v in module.state_dict().items()}
    engine = Engine(module, spec.training, HERE)
    weights = engine.weights()
    engine.close()
    assert weights.keys() == expected.keys()
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    for name, tensor in expected.items():  # they went through bf16 when the engine was built
        assert torch.allclose(weights[name], tensor, rtol=1e-2)
