import json
import math
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, TrainingError
from pipeline.training.config import TrainingConfig
from pipeline.training.engine.engine import (
    Engine,
    engine_config,
    require_known_keys,
    require_precision,
)
from pipeline.training.engine.schedule import rate_factor
from pipeline.training.spec import Environment
from tests.training.stand_in import StandIn, StandInBatch, make_spec, stand_in

HERE = Environment(rank=0, world_size=1, local_rank=0, device="cpu")

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
@pytest.mark.parametrize("can", [False, True])
def test_fp16_is_refused_where_a_cpu_cannot_compute_in_halves_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can: bool
) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: can)
    deepspeed = {"fp16": {"initial_scale_power": 4}}
    spec = make_spec(tmp_path, precision="fp16", deepspeed=deepspeed)
    if can:
        require_precision(spec.training, HERE, "training.pretrain.precision")
        engine = Engine(stand_in(spec).module, spec.training, HERE)
        found = advance(engine, spec, 0, 2)
        engine.close()
        assert all(math.isfinite(norm) for _, norm in found)
        assert engine.skipped == 0
        return
    with pytest.raises(ConfigError, match=r"pretrain.precision: fp16 needs a GPU.*use bf16"):
        require_precision(spec.training, HERE, "training.pretrain.precision")
    with pytest.raises(ConfigError, match=r"training.precision: fp16 needs a GPU.*use bf16"):
        Engine(stand_in(spec).module, spec.training, HERE)
    on_a_gpu = replace(HERE, device="cuda:0")
    require_precision(spec.training, on_a_gpu, "training.pretrain.precision")


@pytest.mark.usefixtures("alone")
def test_swapping_at_a_stage_that_does_not_is_refused(tmp_path: Path) -> None:
    zero = {"offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}}
    spec = make_spec(tmp_path, zero_stage=2, deepspeed={"zero_optimization": zero})
    with pytest.raises(ConfigError, match=r"nvme needs zero_stage=3, found 2.* use device: cpu"):
        Engine(stand_in(spec).module, spec.training, HERE)


@pytest.mark.parametrize(
    ("deepspeed", "refusal"),
    [
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            r"x\.zero_optimization\.offload_optimizer\.devise: .* mean 'device'",
        ),
        (
            {"zero_optimization": {"overlap_com": True}},
            r"x\.zero.*\.overlap_com: .*'overlap_comm'",
        ),
        ({"zero_optimisation": {}}, r"x\.zero_optimisation: unknown key; .* 'zero_optimization'"),
        (
            {"wall_clock": True, "dump_stat": True},
            r"dump_stat: .*'dump_state'.*\n.*x\.wall_clock: ",
        ),
        (
            {"activation_checkpointing": {"partition": True, "profile": True}},
            r"x\.activation_checkpointing\.partition: unknown key; .*'partition_activations'",
        ),
        ({"aio": {"block_siz": 3}}, r"x\.aio\.block_siz: unknown key; .*'block_size'"),
        ({"aio": 3}, "x: DeepSpeed refuses these settings"),
        (
            {"zero_optimization": {"reduce_bucket_size": "large"}},
            r"x\.zero_optimization\.reduce_bucket_size: found 'large'; .*integer",
        ),
    ],
)
def test_a_key_that_deepspeed_does_not_know_is_refused_with_the_near_ones(
    deepspeed: dict[str, Any], refusal: str
) -> None:
    spec = make_spec("run", deepspeed=deepspeed)
    with pytest.raises(ConfigError, match=refusal):
        require_known_keys(spec.training, HERE, "x")


def test_keys_that_deepspeed_knows_are_let_through() -> None:
    known: dict[str, Any] = {
        "activation_checkpointing": {"partition_activations": True},
        "aio": {"block_size": 1048576, "queue_depth": 8},
        "checkpoint": {"tag_validation": "Warn"},
        "comms_logger": {"enabled": False},
        "communication_data_type": "fp32",
        "flops_profiler": {"enabled": True, "profile_step": 1},
        "steps_per_print": 10,
        "tensorboard": {"enabled": False},
        "timers": {"throughput": {"enabled": True}},
        "wall_clock_breakdown": True,
        "zero_optimization": {
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
            "overlap_comm": False,
            "stage3_prefetch_bucket_size": 1,
            "stage3_max_live_parameters": 5,
        },
    }
    spec = make_spec("run", zero_stage=3, deepspeed=known)
    require_known_keys(spec.training, HERE, "x")


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


def config_of(**settings: Any) -> dict[str, Any]:
    sizes = {"steps": 10, "global_batch_size": 24, "micro_batch_size": 2}
    config = TrainingConfig.model_validate({**sizes, **settings})
    return engine_config(config, Environment(1, 3, 1, settings.pop("device", "cpu")), 1000)


def test_the_resolved_configuration_is_plain_and_whole() -> None:
    config = config_of(zero_stage=2, precision="bf16", optimizer={"clip_norm": 0.5})
    assert json.loads(json.dumps(config)) == config
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 4
    assert config["bf16"] == {"enabled": True}
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"]["reduce_bucket_size"] == 4096


def test_further_keys_are_merged_in() -> None:
    more = {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": False}
    config = config_of(zero_stage=3, deepspeed=more)
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["overlap_comm"] is True
    assert config["wall_clock_breakdown"] is False


def test_ranks_without_a_sample_are_refused() -> None:
    with pytest.raises(ConfigError, match="leaves some of 3 ranks without a sample"):
        config_of(global_batch_size=2)
