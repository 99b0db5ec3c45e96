import json
import math
from collections.abc import Generator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import CheckpointError, TrainingError
from pipeline.training import loop
from pipeline.training.assembly import Assembly
from pipeline.training.loop import finished_result, request_stop, step_seed, train
from pipeline.training.metrics_log import read_metrics
from pipeline.training.spec import Environment, TrainingSpec
from tests.training.stand_in import (
    in_processes,
    make_spec,
    stand_in,
    train_and_die,
    train_on,
    train_until,
    without_dropout,
)

HERE = Environment(rank=0, world_size=1, local_rank=0, device="cpu")
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
    lines = (Path(spec.folder) / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def weights(spec: TrainingSpec) -> dict[str, list[float]]:
    tensors = load_file(Path(spec.folder) / "model" / "model.safetensors")
    return {name: tensor.tolist() for name, tensor in tensors.items()}


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
    assert curve(broken) == curve(unbroken)
    assert weights(broken) == weights(unbroken)


def test_a_run_killed_at_any_moments_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 60, "checkpoint_every_steps": 1}
    unbroken, broken = (make_spec(tmp_path / name, **settings) for name in ("unbroken", "broken"))
    train_on(2, unbroken)
    for seconds in np.random.default_rng(5).uniform(0.1, 0.6, size=4):
        in_processes(2, train_until, broken, seconds)
    train_on(2, broken)
    assert len(events(broken, "resumed")) > 1
    assert curve(broken) == curve(unbroken)
    assert weights(broken) == weights(unbroken)


def test_a_run_goes_on_with_other_ranks_and_stages_within_rounding(tmp_path: Path) -> None:
    steady = make_spec(tmp_path / "steady", steps=9)
    train_on(2, steady, without_dropout)
    elastic = tmp_path / "elastic"
    first, second, third = (make_spec(elastic, steps=9, zero_stage=stage) for stage in (1, 3, 2))
    in_processes(2, train_and_die, first, 1, 4, without_dropout)
    in_processes(1, train_and_die, second, 0, 7, without_dropout)
    train_on(2, third, without_dropout)
    resumed = [(event["step"], event["world_size"]) for event in events(third, "resumed")]
    assert resumed == [(3, 1), (6, 2)]
    assert losses(third) == pytest.approx(losses(steady), abs=1e-6)


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

    def test_only_every_so_many_steps_are_logged_and_the_last(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run", log_every_steps=3)
        train(spec, HERE, stand_in)
        assert [line["step"] for line in read_metrics(spec.folder)] == [3, 6, 8]

    def test_the_last_few_checkpoints_are_kept(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run", checkpoint_every_steps=1, keep_checkpoints=3)
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

    def test_a_run_that_died_before_its_model_was_written_writes_it(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run")

        def refuse(_: dict[str, Tensor]) -> None:
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
        loop.clear_stop(spec.folder)
        assert train(spec, HERE, stand_in).state == "finished"
        assert curve(spec) == curve(whole)

    def test_a_loss_that_is_not_finite_is_named_and_never_saved(self, tmp_path: Path) -> None:
        spec = make_spec(tmp_path / "run")

        def poisoned(spec: TrainingSpec) -> Assembly:
            assembly = stand_in(spec)

            def batches(*where: int) -> Generator[Any, None, None]:
                made: Any
                for step, made in enumerate(assembly.batches(*where), start=1):
                    if step == 5:
                        made[2].targets.fill_(math.nan)
                    yield made

            return replace(assembly, batches=batches)

        with pytest.raises(TrainingError, match="pretrain, step 5, rank 0: loss is nan"):
            train(spec, HERE, poisoned)
        assert [line["step"] for line in read_metrics(spec.folder)] == [1, 2, 3, 4]
        kept = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
        assert kept == ["step-00000003"]

    def test_another_runs_folder_is_refused_with_the_keys_that_differ(self, tmp_path: Path) -> None:
        train(make_spec(tmp_path / "run"), HERE, stand_in)
        other = make_spec(tmp_path / "run", learning_rate=0.5)
        with pytest.raises(CheckpointError, match=r"training.learning_rate: 0.02 then, 0.5 now"):
            train(other, HERE, stand_in)
        (tmp_path / "run" / "result.json").unlink()
        with pytest.raises(CheckpointError, match=r"training.learning_rate: 0.02 then, 0.5 now"):
            train(other, HERE, stand_in)

    def test_a_second_process_is_kept_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loop, "SECONDS_TO_WAIT_FOR_LOCK", 0.3)
        spec = make_spec(tmp_path / "run")

        def meddle(step: int, _: int) -> None:
            if step == 2:
                with pytest.raises(TrainingError, match="another process is training here"):
                    train(spec, HERE, stand_in)

        assert train(spec, HERE, partial(stand_in, on_step=meddle)).state == "finished"


def interrupt_at(step: int) -> Any:
    def on_step(made: int, _: int) -> None:
        if made == step:
            raise InterruptedError

    return on_step


def test_seeds_of_steps_and_ranks_are_all_different() -> None:
    seeds = {
        step_seed(seed, step, rank) for seed in range(3) for step in range(20) for rank in range(5)
    }
    assert len(seeds) == 3 * 20 * 5
    torch.manual_seed(max(seeds))
