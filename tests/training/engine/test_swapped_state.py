"""Runs whose optimizer state is in files: they need DeepSpeed's async_io, compiled on the machine.

The model's matrices are a group that is swapped, on two ranks as well; its vectors are one that is
too small and stays in memory.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.training.assembly import Assembly
from pipeline.training.engine.engine import Engine
from pipeline.training.engine.memory import state_bytes
from pipeline.training.engine.requirements import require_swapping
from pipeline.training.spec import RankContext, TrainingSpec
from pipeline.training.tracking.metrics_log import read_metrics
from tests.training.engine.test_engine import advance
from tests.training.stand_in import (
    CLASSES,
    FEATURES,
    OnStep,
    StandIn,
    in_processes,
    make_spec,
    stand_in,
    train_and_die,
    train_on,
)

HERE = RankContext(rank=0, world_size=1, local_rank=0, device="cpu")

pytestmark = pytest.mark.processes  # a compiler, and ranks
WIDE = 701


class Wide(StandIn):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(  # type: ignore[assignment]
            nn.Linear(FEATURES, WIDE), nn.ReLU(), nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE)
        )
        self.norm = nn.LayerNorm(WIDE)
        self.out = nn.Linear(WIDE, CLASSES)


def wide(spec: TrainingSpec, on_step: OnStep | None = None) -> Assembly:
    assembly = stand_in(spec, on_step)
    return replace(assembly, module=Wide())


def wide_without_dropout(spec: TrainingSpec, on_step: OnStep | None = None) -> Assembly:
    assembly = wide(spec, on_step)
    assembly.module.dropout.p = 0.0  # type: ignore[union-attr]
    return assembly


def swapping(folder: Path, nvme: Path, zero: Any = None, **settings: Any) -> TrainingSpec:
    more = {
        "stage3_param_persistence_threshold": 0,
        "offload_optimizer": {"device": "nvme", "nvme_path": str(nvme), **(zero or {})},
    }
    settings = {"zero_stage": 3, **settings}
    return in_memory(folder, deepspeed={"zero_optimization": more}, **settings)


def in_memory(folder: Path, **settings: Any) -> TrainingSpec:
    optimizer = {"learning_rate": 1e-3, **settings.pop("optimizer", {})}
    return make_spec(folder, optimizer=optimizer, **settings)


def swap_files(nvme: Path) -> dict[str, int]:
    """The swap files by what they hold, with their sizes in bytes."""
    return {path.name: path.stat().st_size for path in nvme.rglob("*.swp")}


@pytest.fixture
def nvme(tmp_path: Path) -> Path:
    """A folder for swap files; skips where DeepSpeed cannot swap."""
    folder = tmp_path / "nvme"
    try:
        require_swapping(swapping(tmp_path, folder).training, HERE)
    except ConfigError as refusal:
        pytest.skip(str(refusal))
    return folder


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("precision", "ema_decay", "zero"),
    [
        ("fp32", None, {}),
        ("bf16", 0.5, {}),
        ("fp32", 0.5, {"pipeline_read": True, "pipeline_write": True}),
    ],
    ids=["fp32", "bf16", "pipelined"],
)
def test_state_in_files_trains_as_in_memory_and_resumes_bit_by_bit(
    tmp_path: Path, nvme: Path, precision: str, ema_decay: float | None, zero: dict[str, Any]
) -> None:
    settings = {"precision": precision, "optimizer": {"ema_decay": ema_decay}}
    memory = in_memory(tmp_path, zero_stage=3, **settings)
    files = swapping(tmp_path, nvme, zero, **settings)
    engine = Engine(wide(memory).module, memory.training, HERE)
    expected = advance(engine, memory, 0, 6)
    expected_weights = engine.weights()
    engine.close()

    engine = Engine(wide(files).module, files.training, HERE)
    trace = advance(engine, files, 0, 3)
    kinds = ["exp_avg-", "exp_avg_sq-", *(["average-"] if ema_decay else [])]
    for kind in kinds:
        (size,) = (size for name, size in swap_files(nvme).items() if name.startswith(kind))
        assert size > 4 * 2 * WIDE * WIDE
    kept = {name: tensor.clone() for name, tensor in engine.states()}
    unbroken = advance(engine, files, 3, 6)
    trained, averaged = engine.weights(), engine.weights(ema=ema_decay is not None)
    engine.close()
    assert list(nvme.iterdir()) == []
    assert np.allclose(trace + unbroken, expected, rtol=1e-5 if precision == "fp32" else 1e-2)
    if precision == "fp32":
        for name, tensor in expected_weights.items():
            assert torch.allclose(trained[name], tensor, atol=1e-4), name
    assert kept["exp_avg_sq/hidden.2.weight"].shape == (WIDE, WIDE)
    assert kept["exp_avg_sq/hidden.2.weight"].count_nonzero() > WIDE

    restored = Engine(wide(files).module, files.training, HERE, 3, kept.__getitem__)
    found = {name: tensor.clone() for name, tensor in restored.states()}
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())
    assert advance(restored, files, 3, 6) == unbroken
    for name, tensor in restored.weights(ema=ema_decay is not None).items():
        assert torch.equal(tensor, averaged[name])
    restored.close()


@pytest.mark.usefixtures("alone")
def test_a_step_that_is_not_finite_leaves_the_files_as_they_were(
    tmp_path: Path, nvme: Path
) -> None:
    files = swapping(tmp_path, nvme, optimizer={"ema_decay": 0.5})
    module = Wide()
    engine = Engine(module, files.training, HERE)
    advance(engine, files, 0, 2)
    before = {name: tensor.clone() for name, tensor in engine.states()}
    scale = module.scale.clone()  # type: ignore[operator]
    with torch.no_grad():
        module.norm.register_forward_hook(lambda *_: torch.full((2, WIDE), math.nan))
    ((loss, norm),) = advance(engine, files, 2, 3)
    assert not math.isfinite(loss)
    assert not math.isfinite(norm)
    assert engine.skipped == 1
    assert torch.equal(module.scale, scale)  # type: ignore[arg-type]
    for name, tensor in engine.states():
        assert torch.equal(tensor, before[name]), name
    engine.close()


@pytest.mark.usefixtures("alone")
def test_the_average_is_shown_to_an_evaluation_and_the_weights_come_back(
    tmp_path: Path, nvme: Path
) -> None:
    files = swapping(tmp_path, nvme, optimizer={"ema_decay": 0.5})
    engine = Engine(wide(files).module, files.training, HERE)
    advance(engine, files, 0, 3)
    (batch, *_) = next(wide(files).batches(0, 0, 1))
    evaluated = []
    for ema in (True, False):
        with engine.evaluating(ema) as module:
            evaluated.append(module(batch)[0].item())
    states = [engine.weights(ema) for ema in (True, False)]
    engine.close()
    module = Wide().eval()
    for found, state in zip(evaluated, states, strict=True):
        module.load_state_dict(state)
        assert found == pytest.approx(module(batch)[0].item(), rel=1e-6)
    assert evaluated[0] != evaluated[1]


def test_a_killed_run_with_state_in_files_ends_as_the_unbroken_one(
    tmp_path: Path, nvme: Path
) -> None:
    unbroken, broken = (swapping(tmp_path / name, nvme) for name in ("unbroken", "broken"))
    train_on(2, unbroken, wide)
    assert list(nvme.iterdir()) == []
    exit_codes = in_processes(2, train_and_die, broken, 1, 6, wide)
    assert exit_codes[1] == -9
    assert swap_files(nvme)  # of the rank that was killed
    train_on(2, broken, wide)
    assert list(nvme.iterdir()) == []
    assert [line["loss"] for line in read_metrics(broken.folder)] == [
        line["loss"] for line in read_metrics(unbroken.folder)
    ]


def test_a_run_goes_from_memory_to_files_and_back_with_other_ranks_and_stages(
    tmp_path: Path, nvme: Path
) -> None:
    settings: dict[str, Any] = {"steps": 9, "optimizer": {"ema_decay": 0.9}}
    steady = in_memory(tmp_path / "steady", **settings)
    train_on(2, steady, wide_without_dropout)
    elastic = tmp_path / "elastic"
    first = in_memory(elastic, zero_stage=1, **settings)
    second = swapping(elastic, nvme, **settings)
    in_processes(2, train_and_die, first, 1, 5, wide_without_dropout)
    in_processes(1, train_and_die, second, 0, 8, wide_without_dropout)
    train_on(2, replace_stage(second, 2), wide_without_dropout)
    assert [line["loss"] for line in read_metrics(second.folder)] == pytest.approx(
        [line["loss"] for line in read_metrics(steady.folder)], abs=1e-6
    )


def replace_stage(spec: TrainingSpec, stage: int) -> TrainingSpec:
    training = spec.training.model_copy(update={"zero_stage": stage, "deepspeed": {}})
    return spec.model_copy(update={"training": training})


@pytest.mark.usefixtures("alone")
def test_as_many_bytes_go_to_files_as_foretold(tmp_path: Path, nvme: Path) -> None:
    files = swapping(tmp_path, nvme, optimizer={"ema_decay": 0.5})
    module = wide(files).module
    count = sum(parameter.numel() for parameter in module.parameters())
    engine = Engine(module, files.training, HERE)
    advance(engine, files, 0, 2)
    found = sum(swap_files(nvme).values())
    engine.close()
    foretold = state_bytes(files.training, HERE, count, count)
    assert found / foretold.swapped == pytest.approx(1, abs=0.02)
    assert foretold.offloaded == 5 * 4 * count  # a group that is updated is in memory as a whole
