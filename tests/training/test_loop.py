import json
import math
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from pipeline import storage
from pipeline.errors import CheckpointError, ConfigError, LostError, TrainingError
from pipeline.training import lease
from pipeline.training.assembly import Assembly
from pipeline.training.checkpoints import checkpoint
from pipeline.training.engine.engine import Engine
from pipeline.training.engine.schedule import rate_factor
from pipeline.training.loop import step_seed, train
from pipeline.training.result import finished_result
from pipeline.training.spec import RankContext, TrainingSpec
from pipeline.training.stop_request import clear_stop, request_stop
from pipeline.training.tracking.metrics_log import read_metrics, read_stretches
from tests.training.stand_in import (
    Poisoned,
    evaluated,
    evaluated_without_dropout,
    in_processes,
    make_spec,
    stand_in,
    train_and_die,
    train_on,
    train_until,
    unevenly,
    wait_for_writers,
    without_dropout,
)

HERE = RankContext(rank=0, world_size=1, local_rank=0, device="cpu")
CLOCKS = ("samples_per_second", "tokens_per_second", "data_wait_fraction", "time")


def curve(spec: TrainingSpec) -> list[dict[str, Any]]:
    """The logged steps without the times, which are no function of the run."""
    return [
        {name: value for name, value in line.items() if name not in CLOCKS}
        for line in read_metrics(spec.folder)
    ]


def losses(spec: TrainingSpec) -> list[float]:
    return [line["loss"] for line in read_metrics(spec.folder)]


def events(spec: TrainingSpec, name: str) -> list[dict[str, Any]]:
    lines = storage.read_bytes(storage.join(spec.folder, "events.jsonl")).splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def weights(spec: TrainingSpec) -> dict[str, list[float]]:
    location = storage.join(spec.folder, "model", "model.safetensors")
    tensors = safetensors.torch.load(storage.read_bytes(location))
    return {name: tensor.tolist() for name, tensor in tensors.items()}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")],
)
def test_a_run_whose_rank_was_killed_ends_as_the_unbroken_one(
    tmp_path: Path, stage: int, precision: str
) -> None:
    unbroken = make_spec(tmp_path / "unbroken", zero_stage=stage, precision=precision)
    broken = make_spec(tmp_path / "broken", zero_stage=stage, precision=precision)
    train_on(2, unbroken)
    exit_codes = in_processes(2, train_and_die, broken, 1, 6)
    assert exit_codes[1] == -9
    assert finished_result(broken) is None
    train_on(2, broken)
    assert [event["step"] for event in events(broken, "resumed")] == [3]
    assert not events(broken, "ranks-changed")
    assert curve(broken) == curve(unbroken)
    assert weights(broken) == weights(unbroken)


@pytest.mark.processes
def test_a_run_killed_at_any_moments_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 60, "checkpoints": {"every_steps": 1}}
    unbroken, broken = (make_spec(tmp_path / name, **settings) for name in ("unbroken", "broken"))
    train_on(2, unbroken)
    rng = np.random.default_rng(5)
    for _ in range(4):
        in_processes(2, train_until, broken, int(rng.integers(4, 9)), rng.uniform(0, 0.05))
    train_on(2, broken)
    assert len(events(broken, "resumed")) == 4
    assert curve(broken) == curve(unbroken)
    assert weights(broken) == weights(unbroken)


@pytest.mark.processes
def test_a_run_goes_on_with_other_ranks_and_stages_within_rounding(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "steps": 9,
        "optimizer": {"ema_decay": 0.9},
        "model_weights": "average",
    }
    steady = make_spec(tmp_path / "steady", **settings)
    train_on(2, steady, without_dropout)
    elastic = tmp_path / "elastic"
    first, second, third = (make_spec(elastic, zero_stage=stage, **settings) for stage in (1, 3, 2))
    in_processes(2, train_and_die, first, 1, 5, without_dropout)
    in_processes(1, train_and_die, second, 0, 8, without_dropout)
    train_on(2, third, without_dropout)
    resumed = [(event["step"], event["world_size"]) for event in events(third, "resumed")]
    assert resumed == [(3, 1), (6, 2)]
    changed = [(one["step"], one["before"], one["now"]) for one in events(third, "ranks-changed")]
    assert changed == [(3, 2, 1), (6, 1, 2)]
    assert losses(third) == pytest.approx(losses(steady), abs=1e-6)
    for name, values in weights(steady).items():
        assert np.allclose(weights(third)[name], values, atol=1e-5)


@pytest.mark.processes
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_ranks_that_do_not_divide_the_global_batch_train_as_those_that_do(
    tmp_path: Path, stage: int, micro_batch_size: int
) -> None:
    """Eight samples on three ranks: 2, 3 and 3, in two micro-batches or in two and three."""
    settings: dict[str, Any] = {
        "zero_stage": stage,
        "micro_batch_size": micro_batch_size,
        "steps": 6,
        "evaluation": {"every_steps": 2},
    }
    even, uneven = (make_spec(tmp_path / name, **settings) for name in ("even", "uneven"))
    train_on(2, even, evaluated_without_dropout)
    in_processes(3, train_and_die, uneven, 1, 5, evaluated_without_dropout)
    train_on(3, uneven, evaluated_without_dropout)
    assert [event["step"] for event in events(uneven, "resumed")] == [3]
    for line, expected in zip(curve(uneven), curve(even), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-6)
        assert line["losses"] == pytest.approx(expected["losses"], abs=1e-6)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        found = line.get("evaluation", {}), expected.get("evaluation", {})
        assert found[0] == pytest.approx(found[1], abs=1e-6)
    for name, values in weights(even).items():
        assert np.allclose(weights(uneven)[name], values, atol=1e-5)


@pytest.mark.processes
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_with_other_numbers_of_micro_batches_train_as_with_the_same(
    tmp_path: Path, stage: int
) -> None:
    plain = make_spec(tmp_path / "plain", zero_stage=stage)
    train_on(2, plain, without_dropout)
    settings: dict[str, Any] = {"zero_stage": stage, "loading": {"tokens_per_micro_batch": 100}}
    unbroken, broken = (make_spec(tmp_path / name, **settings) for name in ("unbroken", "broken"))
    train_on(2, unbroken, unevenly)
    for line, expected in zip(curve(unbroken), curve(plain), strict=True):
        assert line["losses"] == pytest.approx(expected["losses"], abs=1e-6)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    in_processes(2, train_and_die, broken, 1, 6, unevenly)
    train_on(2, broken, unevenly)
    assert [event["step"] for event in events(broken, "resumed")] == [3]
    assert curve(broken) == curve(unbroken)
    assert weights(broken) == weights(unbroken)


@pytest.mark.processes
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("policy", ["skip", "roll_back"])
def test_a_run_with_a_step_that_is_not_finite_resumes_bit_by_bit(
    tmp_path: Path, stage: int, policy: str
) -> None:
    poisoned = Poisoned((5,), rank=1)
    settings: dict[str, Any] = {"steps": 10, "zero_stage": stage, "not_finite": policy}
    unbroken, broken = (make_spec(tmp_path / name, **settings) for name in ("unbroken", "broken"))
    train_on(2, unbroken, poisoned)
    in_processes(2, train_and_die, broken, 0, 9, poisoned)  # the checkpoint of step 6 counts one
    train_on(2, broken, poisoned)
    assert [event["step"] for event in events(broken, "resumed")] == [6]
    assert curve(broken) == curve(unbroken)
    assert [line["step"] for line in curve(broken)] == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert weights(broken) == weights(unbroken)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")]
)
def test_an_averaged_and_evaluated_run_resumes_bit_by_bit(
    tmp_path: Path, stage: int, precision: str
) -> None:
    settings: dict[str, Any] = {
        "zero_stage": stage,
        "precision": precision,
        "optimizer": {
            "ema_decay": 0.9,
            "learning_rate_factors": {"hidden.*": 0.3},
            "freeze": ["unused.*"],
        },
        "model_weights": "average",
        "evaluation": {"every_steps": 2, "restore_best": True},
    }
    unbroken, broken = (make_spec(tmp_path / name, **settings) for name in ("unbroken", "broken"))
    train_on(2, unbroken, evaluated)
    in_processes(2, train_and_die, broken, 1, 6, evaluated)
    train_on(2, broken, evaluated)
    assert len(events(broken, "resumed")) == 1
    assert curve(broken) == curve(unbroken)
    assert weights(broken) == weights(unbroken)


def refused(rank: int, spec: TrainingSpec, match: str) -> None:
    here = RankContext(rank, torch.distributed.get_world_size(), rank, "cpu")
    with pytest.raises(CheckpointError, match=match):
        train(spec, here, stand_in)


@pytest.mark.processes
def test_every_rank_is_told_that_no_checkpoint_is_whole(tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "run")
    in_processes(2, train_and_die, spec, 1, 5)
    for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    assert in_processes(2, refused, spec, "none of the checkpoints is whole") == [0, 0]


@pytest.mark.usefixtures("alone")
class TestAlone:
    def test_a_finished_run_is_reported_and_left_alone(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run")
        first = train(spec, HERE, stand_in)
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
        again = train(spec, HERE, stand_in)
        assert (first.state, first.step, first.already_finished) == ("finished", 8, False)
        assert again == replace(first, already_finished=True)
        assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before

    def test_the_log_has_every_figure_of_a_step(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run")
        result = train(spec, HERE, stand_in)
        lines = read_metrics(spec.folder)
        assert [line["step"] for line in lines] == list(range(1, 9))
        assert lines[-1]["loss"] == result.loss
        for line in lines:
            parts = line["losses"]
            assert line["loss"] == pytest.approx(parts["sq"] + 0.3 * parts["abs"], rel=1e-5)
            assert line["padding_fraction"] == 0.5
            assert line["grad_norm"] > 0
        assert [round(line["lr"] / 0.02, 4) for line in lines[:3]] == [0.5, 1.0, 1.0]

    def test_the_use_made_of_a_device_is_logged_where_its_best_is_known(
        self, tmp_path: Path
    ) -> None:
        spec = make_spec(tmp_path / "run")
        stated = {"device_flops": 1e6, "folder": str(tmp_path / "stated")}

        def counted(spec: TrainingSpec) -> Assembly:
            return replace(stand_in(spec), flops=lambda batch: 5000 * batch.num_tokens)

        train(spec, HERE, counted)
        assert all("mfu" not in line for line in read_metrics(spec.folder))
        train(spec.model_copy(update=stated), HERE, counted)
        for line in read_metrics(str(tmp_path / "stated")):
            assert line["mfu"] == pytest.approx(line["tokens_per_second"] * 5e3 / 1e6, rel=1e-3)
        uncountable = stated | {"folder": str(tmp_path / "uncountable")}
        train(spec.model_copy(update=uncountable), HERE, stand_in)
        assert all("mfu" not in line for line in read_metrics(str(tmp_path / "uncountable")))

    def test_only_every_so_many_steps_are_logged_and_the_last(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run", log_every_steps=3)
        train(spec, HERE, stand_in)
        assert [line["step"] for line in read_metrics(spec.folder)] == [3, 6, 8]

    def test_the_last_few_checkpoints_are_kept(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run", checkpoints={"every_steps": 1, "keep_last": 3})
        train(spec, HERE, stand_in)
        kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
        assert kept == ["step-00000006", "step-00000007", "step-00000008"]

    def test_a_damaged_checkpoint_is_named_and_the_one_before_used(self, tmp_path: Path) -> None:
        whole = make_spec(tmp_path / "whole")
        train(whole, HERE, stand_in)
        spec = make_spec(tmp_path / "run")
        with pytest.raises(InterruptedError):
            train(spec, HERE, partial(stand_in, on_step=interrupt_at(8)))
        part = tmp_path / "run" / "checkpoints" / "step-00000006" / "rank-00000.safetensors"
        part.write_bytes(part.read_bytes()[:-1] + b"\0")
        train(spec, HERE, stand_in)
        (damaged,) = events(spec, "damaged-checkpoint")
        assert "step-00000006: rank-00000.safetensors is damaged" in damaged["reason"]
        assert [event["step"] for event in events(spec, "resumed")] == [3]
        assert curve(spec) == curve(whole)

    def test_a_run_without_a_whole_checkpoint_stops_and_leaves_all_as_it_is(
        self, tmp_path: Path
    ) -> None:
        spec = make_spec(tmp_path / "run")
        with pytest.raises(InterruptedError):
            train(spec, HERE, partial(stand_in, on_step=interrupt_at(8)))
        for part in (tmp_path / "run" / "checkpoints").glob("*/rank-00000.safetensors"):
            part.write_bytes(part.read_bytes()[:-1])
        before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")}
        with pytest.raises(CheckpointError, match=r"none .* whole:\n.*006.*\n.*003.*\n.*restart"):
            train(spec, HERE, stand_in)
        assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")} == before

    def test_a_run_that_died_before_its_model_was_written_writes_it(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run")

        def refuse(_: dict[str, Tensor], step: int) -> None:  # noqa: ARG001
            raise InterruptedError

        with pytest.raises(InterruptedError):
            train(spec, HERE, lambda spec: replace(stand_in(spec), save=refuse))
        assert finished_result(spec) is None
        result = train(spec, HERE, stand_in)
        assert (result.state, len(read_metrics(spec.folder))) == ("finished", 8)
        assert (tmp_path / "run" / "model" / "model.safetensors").exists()

    def test_a_requested_stop_writes_a_checkpoint_and_can_be_gone_on_from(
        self, tmp_path: Path
    ) -> None:
        whole, spec = make_spec(tmp_path / "whole"), make_spec(tmp_path / "run")
        train(whole, HERE, stand_in)
        (tmp_path / "run").mkdir()
        request_stop(spec.folder)
        result = train(spec, HERE, stand_in)
        assert (result.state, result.step, result.model_folder) == ("stopped", 1, None)
        clear_stop(spec.folder)
        assert train(spec, HERE, stand_in).state == "finished"
        assert curve(spec) == curve(whole)

    def test_a_loss_that_is_not_finite_is_named_and_never_saved(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run")
        with pytest.raises(TrainingError, match="pretrain, step 5, rank 0: loss is nan") as told:
            train(spec, HERE, Poisoned((5,)))
        assert str(told.value).endswith(
            "give the same command with `training.pretrain.optimizer.learning_rate=0.01` (or a "
            "longer training.pretrain.schedule.warmup_steps) and `--from-checkpoint`: it goes on "
            "from the checkpoint at step 3"
        )
        with pytest.raises(TrainingError, match="no checkpoint yet, so it starts anew"):
            train(make_spec(tmp_path / "early"), HERE, Poisoned((2,)))
        assert [line["step"] for line in read_metrics(spec.folder)] == [1, 2, 3, 4]
        kept = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
        assert kept == ["step-00000003"]

    def test_a_run_may_go_on_under_another_policy_than_it_stopped_with(
        self, tmp_path: Path
    ) -> None:
        spec = make_spec(tmp_path / "run")
        with pytest.raises(TrainingError, match="step 5"):
            train(spec, HERE, Poisoned((5,)))
        train(make_spec(tmp_path / "run", not_finite="skip"), HERE, Poisoned((5,)))
        assert [line["step"] for line in read_metrics(spec.folder)] == [1, 2, 3, 4, 6, 7, 8]

    def test_skipped_steps_are_counted_and_too_many_in_a_row_end_the_run(
        self, tmp_path: Path
    ) -> None:
        settings: dict[str, Any] = {"not_finite": "skip", "max_skips_in_a_row": 2}
        spec = make_spec(tmp_path / "run", **settings)
        assert train(spec, HERE, Poisoned((2, 4, 5))).state == "finished"
        lines = read_metrics(spec.folder)
        assert [(line["step"], line["skipped_steps"]) for line in lines] == [
            (1, 0),
            (3, 1),
            (6, 3),
            (7, 3),
            (8, 3),
        ]
        assert [event["step"] for event in events(spec, "skipped")] == [2, 4, 5]
        assert "loss is nan" in events(spec, "skipped")[0]["reason"]
        spec = make_spec(tmp_path / "worse", **settings)
        with pytest.raises(TrainingError, match=r"step 6, .* and 2 steps before it were skipped"):
            train(spec, HERE, Poisoned((4, 5, 6)))

    def test_a_roll_back_leaves_out_what_came_after_the_checkpoint(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run", not_finite="roll_back")
        train(spec, HERE, Poisoned((5,)))
        (event,) = events(spec, "rolled-back")
        assert (event["step"], event["to_step"], event["times"]) == (5, 3, 1)
        lines = read_metrics(spec.folder)
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 6, 7, 8]
        assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 0, 2, 2, 2]
        # the same by hand: the state of step 3, then the batches and the rates of 6, 7 and 8
        assembly = stand_in(spec)
        engine = Engine(assembly.module, spec.training, HERE)
        for step, batches in enumerate(assembly.batches(0, 0, 1), start=1):
            if step == 4:
                kept = {name: tensor.clone() for name, tensor in engine.states()}
                engine.close()
                module = stand_in(spec).module
                engine = Engine(module, spec.training, HERE, 5, kept.__getitem__, skipped=2)
            if step in (4, 5):
                continue
            torch.manual_seed(step_seed(spec.seed, step, 0))
            engine.advance(list(batches))
        expected = {name: tensor.tolist() for name, tensor in engine.weights().items()}
        engine.close()
        assert weights(spec) == expected

    def test_too_many_roll_backs_end_the_run(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run", not_finite="roll_back", max_roll_backs=2)
        with pytest.raises(TrainingError, match=r"step 7, .* was rolled back 2 times before"):
            train(spec, HERE, Poisoned((2, 5, 7)))
        assert [event["to_step"] for event in events(spec, "rolled-back")] == [0, 3]

    def test_a_run_is_evaluated_and_says_what_it_found(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run", evaluation={"every_steps": 3}, log_every_steps=2)
        train(spec, HERE, evaluated)
        found = {line["step"]: line.get("evaluation", {}) for line in read_metrics(spec.folder)}
        assert [step for step, figures in found.items() if figures] == [3, 6, 8]
        assert list(found) == [2, 3, 4, 6, 8]
        assert found[3]["loss"] == pytest.approx(found[3]["sq"] + 0.3 * found[3]["abs"])
        assert found[8]["loss"] < found[3]["loss"]

    def test_evaluating_changes_nothing_in_training(self, tmp_path: Path) -> None:
        plain, spec = (
            make_spec(
                tmp_path / name, optimizer={"ema_decay": 0.5}, evaluation={"every_steps": every}
            )
            for name, every in (("plain", None), ("run", 1))
        )
        average = spec.training.model_copy(update={"model_weights": "average"})
        spec = spec.model_copy(update={"training": average})
        train(plain, HERE, evaluated)
        train(spec, HERE, evaluated)
        assert losses(spec) == losses(plain)

    def test_the_best_model_is_written_and_waiting_for_a_better_one_ends(
        self, tmp_path: Path
    ) -> None:
        found = iter([3.0, 1.0, 2.0, math.nan, 0.5])
        settings: dict[str, Any] = {
            "steps": 12,
            "evaluation": {"every_steps": 2, "restore_best": True, "patience": 2},
            "checkpoints": {"every_steps": 3},
        }
        spec = make_spec(tmp_path / "run", **settings)
        result = train(spec, HERE, partial(evaluated, evaluate=lambda *_: {"loss": next(found)}))
        assert (result.state, result.step, result.steps) == ("finished", 8, 12)
        kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
        assert kept == ["step-00000004", "step-00000006", "step-00000008"]
        manifest = checkpoint.read_manifest(str(tmp_path / "run" / "checkpoints" / kept[0]))
        read = checkpoint.reader(
            str(tmp_path / "run" / "checkpoints" / kept[0]), manifest, tmp_path
        )
        best = checkpoint.weights(manifest, read, ema=False)
        assert weights(spec) == {name: tensor.tolist() for name, tensor in best.items()}
        assert train(spec, HERE, stand_in).already_finished

    def test_a_damaged_best_checkpoint_is_told_with_both_ways_on(self, tmp_path: Path) -> None:
        found = iter([3.0, 1.0, 2.0, 4.0])
        spec = make_spec(tmp_path / "run", evaluation={"every_steps": 2, "restore_best": True})

        def damage(step: int, _: int) -> None:
            wait_for_writers()
            if step == 8:
                best = tmp_path / "run" / "checkpoints" / "step-00000004"
                part = best / "rank-00000.safetensors"
                part.write_bytes(part.read_bytes()[:-1] + b"\x81")

        evaluating = partial(evaluated, on_step=damage, evaluate=lambda *_: {"loss": next(found)})
        expected = r"step-00000004: rank-0.* is damaged(.*\n)*.*evaluation\.restore_best=false"
        with pytest.raises(CheckpointError, match=expected):
            train(spec, HERE, evaluating)
        assert checkpoint.steps_in(str(tmp_path / "run" / "checkpoints")) == [4, 6, 8]

    def test_the_best_few_are_kept_wherever_they_are_found(self, tmp_path: Path) -> None:
        found = iter([3.0, 1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0])
        spec = make_spec(
            tmp_path / "run",
            evaluation={"every_steps": 1},
            checkpoints={"keep_best": 1, "every_steps": 3},
        )
        train(spec, HERE, partial(evaluated, evaluate=lambda *_: {"loss": next(found)}))
        kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
        assert kept == ["step-00000002", "step-00000006", "step-00000008"]

    def test_a_run_whose_patience_was_spent_before_it_died_ends_at_once(
        self, tmp_path: Path
    ) -> None:
        spec = make_spec(tmp_path / "run", evaluation={"every_steps": 1, "patience": 1})
        found = iter([1.0, 2.0])

        def refuse(_: dict[str, Tensor], step: int) -> None:  # noqa: ARG001
            raise InterruptedError

        def dying(spec: TrainingSpec) -> Assembly:
            assembly = evaluated(spec, evaluate=lambda *_: {"loss": next(found)})
            return replace(assembly, save=refuse)

        with pytest.raises(InterruptedError):
            train(spec, HERE, dying)
        result = train(spec, HERE, partial(evaluated, evaluate=lambda *_: {"loss": 0.0}))
        assert (result.state, result.step) == ("finished", 2)

    def test_an_evaluation_without_the_figure_that_decides_is_refused(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run", evaluation={"every_steps": 2, "best_by": "recall"})
        with pytest.raises(ConfigError, match=r"found 'recall', .* gives abs, loss, sq"):
            train(spec, HERE, evaluated)
        spec = make_spec(tmp_path / "other", evaluation={"every_steps": 2})
        with pytest.raises(ConfigError, match="no held-out data"):
            train(spec, HERE, stand_in)

    def test_an_fp16_run_that_died_goes_on_with_its_loss_scale(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from deepspeed.accelerator import get_accelerator

        # torch computes in halves on any CPU, though DeepSpeed says that this one cannot
        monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
        settings: dict[str, Any] = {
            "steps": 14,
            "precision": "fp16",
            "deepspeed": {
                "fp16": {"initial_scale_power": 22, "loss_scale_window": 3, "hysteresis": 1}
            },
        }
        whole, spec = (make_spec(tmp_path / name, **settings) for name in ("whole", "run"))
        train(whole, HERE, stand_in)
        with pytest.raises(InterruptedError):
            train(spec, HERE, partial(stand_in, on_step=interrupt_at(11)))
        train(spec, HERE, stand_in)
        assert [event["step"] for event in events(spec, "resumed")] == [9]
        assert curve(spec) == curve(whole)
        lines = read_metrics(spec.folder)
        assert lines[-1]["skipped_steps"] == [line["grad_norm"] for line in lines].count(None) > 0
        assert len({line["loss_scale"] for line in lines}) > 2

    def test_the_model_may_be_the_average_of_the_weights(self, tmp_path: Path) -> None:
        settings: dict[str, Any] = {"optimizer": {"ema_decay": 0.75}, "model_weights": "average"}
        spec = make_spec(
            tmp_path / "run", checkpoints={"every_steps": 1, "keep_last": 9}, **settings
        )
        train(spec, HERE, stand_in)
        average = {
            name: tensor.clone() for name, tensor in stand_in(spec).module.state_dict().items()
        }
        for step in range(1, 9):
            location = str(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
            manifest = checkpoint.read_manifest(location)
            now = checkpoint.weights(
                manifest, checkpoint.reader(location, manifest, tmp_path), ema=False
            )
            for name, tensor in now.items():
                average[name] = torch.lerp(average[name], tensor, 0.25)
        for name, values in weights(spec).items():
            assert torch.allclose(torch.tensor(values), average[name], atol=1e-6)
        assert weights(spec)["out.weight"] != now["out.weight"].tolist()

    def test_another_runs_folder_is_refused_with_the_keys_that_differ(self, tmp_path: Path) -> None:
        train(make_spec(tmp_path / "run"), HERE, stand_in)
        other = make_spec(tmp_path / "run", loading={"shuffle_window_shards": 3})
        differs = r"training.pretrain.loading.shuffle_window_shards: 8 then, 3 now"
        with pytest.raises(CheckpointError, match=differs):
            train(other, HERE, stand_in)
        (tmp_path / "run" / "result.json").unlink()
        with pytest.raises(CheckpointError, match=differs):
            train(other, HERE, stand_in)
        assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2

    def test_a_finished_run_goes_on_to_more_steps_as_a_new_stretch(self, tmp_path: Path) -> None:
        train(make_spec(tmp_path / "run", schedule={"decay": "constant"}), HERE, stand_in)
        first = losses(make_spec(tmp_path / "run"))
        longer = make_spec(tmp_path / "run", schedule={"decay": "constant"}, steps=11)
        result = train(longer, HERE, stand_in)
        assert (result.state, result.step, result.already_finished) == ("finished", 11, False)
        train(
            make_spec(tmp_path / "whole", schedule={"decay": "constant"}, steps=11), HERE, stand_in
        )
        assert losses(longer)[:8] == first
        assert curve(longer) == curve(make_spec(tmp_path / "whole"))
        (stretch,) = read_stretches(longer.folder)
        assert (stretch.step, stretch.changed) == (8, {"training.pretrain.steps": (8, 11)})
        assert train(longer, HERE, stand_in).already_finished

    def test_a_stretch_begins_where_its_checkpoint_is_however_often_it_is_begun(
        self, tmp_path: Path
    ) -> None:
        spec = make_spec(tmp_path / "run")
        with pytest.raises(InterruptedError):
            train(spec, HERE, partial(stand_in, on_step=interrupt_at(5)))
        for rate in (0.01, 0.005):
            slower = make_spec(tmp_path / "run", optimizer={"learning_rate": rate})
            with pytest.raises(InterruptedError):  # before it has a checkpoint of its own
                train(slower, HERE, partial(stand_in, on_step=interrupt_at(6)))
        train(slower, HERE, stand_in)
        (stretch,) = read_stretches(spec.folder)
        changed = {"training.pretrain.optimizer.learning_rate": (0.02, 0.005)}
        assert (stretch.step, stretch.changed) == (3, changed)
        rates = [line["lr"] for line in read_metrics(spec.folder)]
        factors = [rate_factor(spec.training.schedule, 8, step) for step in range(8)]
        replaced = sorted(path.name for path in (tmp_path / "run").glob("metrics.replaced*"))
        assert replaced == ["metrics.replaced-1.jsonl", "metrics.replaced-2.jsonl"]
        peaks = [0.02] * 3 + [0.005] * 5
        assert rates == [peak * factor for peak, factor in zip(peaks, factors, strict=True)]

    def test_waiting_for_a_better_evaluation_begins_anew_in_a_new_stretch(
        self, tmp_path: Path
    ) -> None:
        figures = iter([1.0, 2.0, 3.0, 0.5, 0.25, 0.1])
        found = partial(evaluated, evaluate=lambda *_: {"loss": next(figures)})
        settings: dict[str, Any] = {"evaluation": {"every_steps": 1, "patience": 2}, "steps": 6}
        assert train(make_spec(tmp_path / "run", **settings), HERE, found).step == 3
        slower = make_spec(tmp_path / "run", optimizer={"learning_rate": 0.001}, **settings)
        assert train(slower, HERE, found).step == 6

    def test_a_run_in_an_object_store_ends_as_one_on_a_disk(
        self, tmp_path: Path, object_store: str
    ) -> None:
        whole = make_spec(tmp_path / "whole", not_finite="roll_back")
        train(whole, HERE, Poisoned((5,)))
        spec = make_spec(f"{object_store}/run", not_finite="roll_back")
        with pytest.raises(InterruptedError):
            train(spec, HERE, partial(Poisoned((5,)), on_step=interrupt_at(8)))
        request_stop(spec.folder)
        assert train(spec, HERE, Poisoned((5,))).step == 7
        clear_stop(spec.folder)
        result = train(spec, HERE, Poisoned((5,)))
        assert (result.state, result.step) == ("finished", 8)
        assert [event["step"] for event in events(spec, "resumed")] == [6, 7]
        assert curve(spec) == curve(whole)
        assert weights(spec) == weights(whole)
        kept = storage.list_names(f"{spec.folder}/checkpoints")
        assert kept == ["step-00000007", "step-00000008"]
        assert train(spec, HERE, stand_in).already_finished

    def test_a_run_whose_folder_was_taken_over_ends(
        self, object_store: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lease, "SECONDS_BETWEEN_BEATS", 0.05)
        spec = make_spec(f"{object_store}/run", steps=200)

        def take_over(step: int, _: int) -> None:
            if step == 3:
                storage.write_bytes(f"{object_store}/.run.lock-00000002", b"another")
            time.sleep(0.02)

        with pytest.raises(LostError, match="taken over by another process"):
            train(spec, HERE, partial(stand_in, on_step=take_over))
        assert finished_result(spec) is None

    def test_a_run_whose_folders_lock_was_taken_away_ends(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run")

        def take_away(step: int, _: int) -> None:
            if step == 3:
                (tmp_path / ".run.lock").unlink()

        with pytest.raises(LostError, match="or taken away"):
            train(spec, HERE, partial(stand_in, on_step=take_away))

    def test_a_run_without_a_finite_loss_to_show_is_not_finished(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run")

        def remove_log(step: int, _: int) -> None:
            if step == 8:
                wait_for_writers()
                shutil.rmtree(tmp_path / "run")

        with pytest.raises(TrainingError, match="no finite loss of any step"):
            train(spec, HERE, partial(stand_in, on_step=remove_log))
        skipping = make_spec(tmp_path / "skipping", steps=3, not_finite="skip")
        with pytest.raises(TrainingError, match="was every step skipped"):
            train(skipping, HERE, Poisoned((1, 2, 3)))
        for name in ("run", "skipping"):
            assert not (tmp_path / name / "result.json").exists()
            assert not (tmp_path / name / "model").exists()

    def test_a_second_process_is_kept_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lease, "SECONDS_TO_WAIT", 0.3)
        spec = make_spec(tmp_path / "run")

        def meddle(step: int, _: int) -> None:
            if step == 2:
                with pytest.raises(TrainingError, match="another command is at work here"):
                    train(spec, HERE, stand_in)

        assert train(spec, HERE, partial(stand_in, on_step=meddle)).state == "finished"


def interrupt_at(step: int) -> Any:
    def on_step(made: int, _: int) -> None:
        wait_for_writers()
        if made == step:
            raise InterruptedError

    return on_step


def test_seeds_of_steps_and_ranks_are_all_different() -> None:
    seeds = {
        step_seed(seed, step, rank) for seed in range(3) for step in range(20) for rank in range(5)
    }
    assert len(seeds) == 3 * 20 * 5
    torch.manual_seed(max(seeds))
