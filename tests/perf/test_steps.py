"""The bare loop does the work that a run does, and the run stands still while it does."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.perf import steps
from pipeline.perf.steps import BARE, OURS, Marked, _BareLoop
from pipeline.training.engine.engine import Engine
from pipeline.training.loop import train
from pipeline.training.spec import RankContext
from pipeline.training.tracking.metrics_log import read_metrics
from tests.training.conftest import alone as alone
from tests.training.stand_in import make_spec, stand_in, without_dropout

HERE = RankContext(rank=0, world_size=1, local_rank=0, device="cpu")


@pytest.mark.usefixtures("alone")
def test_the_bare_loop_ends_with_the_weights_of_an_engine_on_the_same_batches(
    tmp_path: Path,
) -> None:
    spec = make_spec(tmp_path, zero_stage=0, schedule={"warmup_steps": 0, "decay": "constant"})
    assembly = without_dropout(spec)
    bare = _BareLoop(assembly.module, spec.training)
    engine = Engine(assembly.module, spec.training, HERE)
    for batches in assembly.batches(0, 0, 1):
        engine.advance(list(batches))
        bare.train(list(batches))
    engine.close()
    theirs = dict(bare._module.named_parameters())
    for name, parameter in assembly.module.named_parameters():
        if not name.startswith("unused"):  # with no gradient, only an engine lets it decay
            torch.testing.assert_close(parameter, theirs[name])


@pytest.mark.usefixtures("alone")
def test_a_run_with_a_bare_loop_in_it_trains_as_without_and_times_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "assemble", without_dropout)
    plain, beside = make_spec(tmp_path / "plain"), make_spec(tmp_path / "beside")
    train(plain, HERE, without_dropout)
    train(beside, HERE, Marked(bare_steps=3))
    curves = [[line["loss"] for line in read_metrics(one.folder)] for one in (plain, beside)]
    assert curves[0] == curves[1]
    lines = (tmp_path / "beside" / "marks-0.jsonl").read_text().splitlines()
    assembled, *rounds = map(json.loads, lines)
    assert assembled["called"] <= assembled["assembled"]
    assert [one["steps"] for one in rounds] == [3, 3]  # of 8 steps
    assert all(min(*one[OURS], *one[BARE]) > 0 for one in rounds)


@pytest.mark.usefixtures("alone")
def test_each_step_leaves_a_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "assemble", stand_in)
    train(make_spec(tmp_path), HERE, Marked())
    marks = [json.loads(line) for line in (tmp_path / "marks-0.jsonl").read_text().splitlines()]
    assert [mark["begun"] for mark in marks[1:]] == list(range(8))
    walls = [mark["wall"] for mark in marks[1:]]
    assert walls == sorted(walls)
