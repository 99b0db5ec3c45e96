import math
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import TrainingError
from pipeline.training.engine.engine import Engine
from pipeline.training.engine.schedule import rate_factor
from pipeline.training.spec import RankContext
from tests.training.stand_in import StandIn, StandInBatch, make_spec, stand_in

HERE = RankContext(rank=0, world_size=1, local_rank=0, device="cpu")

STAGES = [
    (0, "fp32"),
    (1, "fp32"),
    (1, "bf16"),
    (2, "fp32"),
    (2, "bf16"),
    (3, "fp32"),
    (3, "bf16"),
]


def advance(engine: Engine, spec: Any, start: int, stop: int) -> list[tuple[float, float]]:
    """Trains from one step to another; returns each step's mean loss and gradient norm."""
    source = stand_in(spec).batches(start, 0, 1)
    trace = []
    for step in range(start, stop):
        torch.manual_seed(step)
        batches = [batch.to(engine.device, engine.dtype) for batch in next(source)]
        losses, norm = engine.advance(batches)
        trace.append((float(sum(loss for loss, _ in losses)) / len(losses), norm))
    return trace


def with_plain_torch(spec: Any, steps: int) -> list[tuple[float, float]]:
    """The same steps with torch alone: what the engine must come to."""
    assembly, config = stand_in(spec), spec.training
    module = assembly.module
    matrices = [p for p in module.parameters() if p.ndim == 2]
    vectors = [p for p in module.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": 0.01},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.optimizer.learning_rate,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(config.schedule, config.steps, step)
    )
    trace = []
    for step, batches in zip(range(steps), assembly.batches(0, 0, 1), strict=False):
        torch.manual_seed(step)
        losses = []
        for batch in batches:
            loss, _ = module(batch)
            (loss / len(batches)).backward()
            losses.append(float(loss.detach()))
        norm = nn.utils.clip_grad_norm_(module.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        trace.append((sum(losses) / len(losses), float(norm)))
    return trace


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_every_stage_trains_as_plain_torch_does(tmp_path: Path, stage: int, precision: str) -> None:
    spec = make_spec(tmp_path, zero_stage=stage, precision=precision)
    engine = Engine(stand_in(spec).module, spec.training, HERE)
    trace, expected = advance(engine, spec, 0, 6), with_plain_torch(spec, 6)
    engine.close()
    losses, norms = zip(*trace, strict=True)
    expected_losses, expected_norms = zip(*expected, strict=True)
    exact = precision == "fp32"
    assert losses == pytest.approx(expected_losses, rel=1e-5 if exact else 1e-2)
    assert norms == pytest.approx(expected_norms, rel=1e-5 if exact else 0.1)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_a_restored_engine_goes_on_bit_by_bit(tmp_path: Path, stage: int, precision: str) -> None:
    spec = make_spec(tmp_path, zero_stage=stage, precision=precision)
    engine = Engine(stand_in(spec).module, spec.training, HERE)
    advance(engine, spec, 0, 3)
    kept = {name: tensor.clone() for name, tensor in engine.states()}
    unbroken = advance(engine, spec, 3, 8)
    engine.close()
    restored = Engine(stand_in(spec).module, spec.training, HERE, 3, kept.__getitem__)
    assert {name: tensor.tolist() for name, tensor in restored.states()} == {
        name: tensor.tolist() for name, tensor in kept.items()
    }
    assert advance(restored, spec, 3, 8) == unbroken
    restored.close()


class Infinite(StandIn):
    """Its loss is infinite with a finite gradient, while `infinite`."""

    infinite = False

    def forward(self, batch: StandInBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = super().forward(batch)
        return loss + (math.inf if self.infinite else 0.0), parts


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    tmp_path: Path, stage: int, precision: str
) -> None:
    spec = make_spec(tmp_path, zero_stage=stage, precision=precision, optimizer={"ema_decay": 0.5})
    module = Infinite()
    engine = Engine(module, spec.training, HERE)
    advance(engine, spec, 0, 3)
    before = {name: tensor.tolist() for name, tensor in engine.states()}
    module.infinite = True
    ((loss, norm),) = advance(engine, spec, 3, 4)
    assert not math.isfinite(loss)
    assert not math.isfinite(norm)
    assert engine.skipped == 1
    assert {name: tensor.tolist() for name, tensor in engine.states()} == before
    module.infinite = False
    kept = {name: tensor.clone() for name, tensor in engine.states()}
    unbroken = advance(engine, spec, 4, 7)
    engine.close()
    assert all(math.isfinite(norm) for _, norm in unbroken)
    restored = Engine(Infinite(), spec.training, HERE, 4, kept.__getitem__, skipped=1)
    assert advance(restored, spec, 4, 7) == unbroken
    restored.close()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_average_and_rates_by_name_come_to_what_plain_torch_makes(
    tmp_path: Path, stage: int
) -> None:
    factors = {"hidden.*": 0.25}
    spec = make_spec(
        tmp_path,
        zero_stage=stage,
        precision="fp32",
        optimizer={
            "ema_decay": 0.8,
            "learning_rate_factors": factors,
            "clip_norm": 0,
            "weight_decay": 0,
        },
    )
    engine = Engine(stand_in(spec).module, spec.training, HERE)
    advance(engine, spec, 0, 5)
    trained, averaged = engine.weights(), engine.weights(ema=True)
    evaluated = []
    (batch, *_) = next(stand_in(spec).batches(0, 0, 1))
    for uses_average in (True, False):
        with engine.evaluating(uses_average) as module:
            assert not module.training
            evaluated.append(module(batch)[0].item())
    engine.close()

    module = stand_in(spec).module.eval()
    for found, state in zip(evaluated, (averaged, trained), strict=True):
        module.load_state_dict(state)
        assert found == pytest.approx(module(batch)[0].item(), rel=1e-6)
    module = stand_in(spec).module
    slow = list(module.hidden.parameters())  # type: ignore[union-attr]
    fast = [p for p in module.parameters() if all(p is not other for other in slow)]
    rate = spec.training.optimizer.learning_rate
    optimizer = torch.optim.AdamW(
        [{"params": slow, "lr": 0.25 * rate}, {"params": fast, "lr": rate}], weight_decay=0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(spec.training.schedule, spec.training.steps, step)
    )
    average = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for step, batches in zip(range(5), stand_in(spec).batches(0, 0, 1), strict=False):
        torch.manual_seed(step)
        for batch in batches:
            (module(batch)[0] / len(batches)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for name, tensor in module.state_dict().items():
            average[name] = torch.lerp(average[name], tensor, 0.2)
    for name, tensor in module.state_dict().items():
        assert torch.allclose(trained[name], tensor, atol=1e-5), name
        assert torch.allclose(averaged[name], average[name], atol=1e-5), name


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_an_optimizer_offloaded_to_the_cpu_trains_and_resumes_the_same(
    tmp_path: Path, stage: int, precision: str
) -> None:
    here = make_spec(tmp_path, zero_stage=stage, precision=precision, optimizer={"ema_decay": 0.5})
    zero: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}}
    if stage == 3:
        zero |= {"offload_param": {"device": "cpu"}, "stage3_param_persistence_threshold": 0}
    away = make_spec(
        tmp_path,
        zero_stage=stage,
        precision=precision,
        optimizer={"ema_decay": 0.5},
        deepspeed={"zero_optimization": zero},
    )
    engine = Engine(stand_in(here).module, here.training, HERE)
    expected = advance(engine, here, 0, 6)
    engine.close()
    engine = Engine(stand_in(away).module, away.training, HERE)
    trace = advance(engine, away, 0, 3)
    kept = {name: tensor.clone() for name, tensor in engine.states()}
    unbroken = advance(engine, away, 3, 6)
    engine.close()
    assert [loss for loss, _ in trace + unbroken] == pytest.approx(
        [loss for loss, _ in expected], rel=1e-5 if precision == "fp32" else 1e-2
    )
    restored = Engine(stand_in(away).module, away.training, HERE, 3, kept.__getitem__)
    assert advance(restored, away, 3, 6) == unbroken
    restored.close()


@pytest.fixture
def _halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a CPU do what only DeepSpeed says it cannot: torch computes in halves on any."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)


@pytest.mark.usefixtures("alone", "_halves")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_finds_its_loss_scale_and_goes_on_with_it_bit_by_bit(
    tmp_path: Path, stage: int
) -> None:
    fp16 = {"initial_scale_power": 24, "loss_scale_window": 3, "hysteresis": 1}
    zero = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    spec = make_spec(
        tmp_path,
        steps=16,
        zero_stage=stage,
        precision="fp16",
        deepspeed={"fp16": fp16, "zero_optimization": zero},
    )
    engine = Engine(stand_in(spec).module, spec.training, HERE)
    assert engine.dtype == torch.float16
    first = advance(engine, spec, 0, 9)
    skipped, scale = engine.skipped, engine.loss_scale()
    assert skipped > 0
    assert scale is not None
    assert scale["cur_scale"] < 2**24
    assert [math.isfinite(norm) for _, norm in first].count(False) == skipped
    kept = {name: tensor.clone() for name, tensor in engine.states()}
    unbroken = advance(engine, spec, 9, 16)
    assert engine.loss_scale() != scale
    engine.close()
    restored = Engine(
        stand_in(spec).module,
        spec.training,
        HERE,
        9,
        kept.__getitem__,
        skipped=skipped,
        loss_scale=scale,
    )
    assert advance(restored, spec, 9, 16) == unbroken
    restored.close()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("stage", [0, 1])
def test_a_run_that_leaves_fp16_leaves_its_loss_scale(tmp_path: Path, stage: int) -> None:
    spec = make_spec(tmp_path, zero_stage=stage, precision="fp32")
    kept = {name: tensor.clone() for name, tensor in stand_in(spec).module.state_dict().items()}

    def read(name: str) -> Tensor:
        kind, _, parameter = name.partition("/")
        whole = kept[parameter]
        return whole if kind in ("weight", "buffer") else torch.zeros_like(whole)

    scale = {"cur_scale": 4.0, "cur_iter": 3, "last_overflow_iter": 1, "cur_hysteresis": 1}
    engine = Engine(stand_in(spec).module, spec.training, HERE, 3, read, loss_scale=scale)
    assert engine.loss_scale() is None
    ((_, norm),) = advance(engine, spec, 3, 4)
    assert math.isfinite(norm)
    engine.close()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_micro_batches_of_any_sizes_make_the_same_update(tmp_path: Path, stage: int) -> None:
    """The mean over the samples is that of the micro-batches weighted by their samples."""
    made: list[dict[str, Tensor]] = []
    for sizes in ([2, 2, 2, 2], [1, 4, 3], [8]):
        spec = make_spec(tmp_path, zero_stage=stage, loading={"tokens_per_micro_batch": 100})
        module, parts = StandIn(), partial(stand_in, sizes=lambda *_, sizes=sizes: sizes)
        torch.manual_seed(0)
        module.load_state_dict(stand_in(spec).module.state_dict())
        module.dropout.p = 0.0
        engine = Engine(module, spec.training, HERE)
        norms = []
        for batches in islice(parts(spec).batches(0, 0, 1), 4):
            shares = [batch.num_samples / 8 for batch in batches]
            norms.append(engine.advance(list(batches), shares)[1])
        made.append({**engine.weights(), "norms": torch.tensor(norms)})
        engine.close()
    for other in made[1:]:
        for name, tensor in made[0].items():
            assert torch.allclose(tensor, other[name], atol=1e-6)


@pytest.mark.usefixtures("alone")
def test_a_step_of_too_many_micro_batches_is_refused(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    engine = Engine(stand_in(spec).module, spec.training, HERE)
    with pytest.raises(TrainingError, match="up to 4 micro-batches on a rank, found 5"):
        engine.advance([None] * 5)
    engine.close()
