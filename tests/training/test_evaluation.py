from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.errors import TrainingError
from pipeline.training.evaluation import held_out_losses
from pipeline.training.spec import RankContext, TrainingSpec
from tests.training.stand_in import StandIn, StandInBatch, in_processes, make_spec, stand_in

HERE = RankContext(rank=0, world_size=1, local_rank=0, device="cpu")
SIZES = (2, 3, 1, 4)


def make_batches() -> list[StandInBatch]:
    torch.manual_seed(3)
    return [StandInBatch(torch.randn(n, 5), torch.randn(n, 3), n, n, n) for n in SIZES]


def module_of(spec: TrainingSpec) -> torch.nn.Module:
    return stand_in(spec).module.eval()


def losses_of_a_rank(rank: int, spec: TrainingSpec, expected: dict[str, float]) -> None:
    here = RankContext(rank, dist.get_world_size(), rank, "cpu")
    with torch.no_grad():
        found = held_out_losses(module_of(spec), make_batches()[rank::2], here, 2)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.processes
@pytest.mark.usefixtures("alone")
@torch.no_grad()
def test_the_mean_is_over_samples_whatever_batch_and_rank_they_are_on(tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "run")
    module, batches = module_of(spec), make_batches()
    features, targets = (
        torch.cat([getattr(batch, name) for batch in batches]) for name in ("features", "targets")
    )
    loss, parts = module(StandInBatch(features, targets, 10, 10, 10))
    expected = {"loss": float(loss), **{name: float(part) for name, part in parts.items()}}
    assert held_out_losses(module, batches, HERE, 4) == pytest.approx(expected, rel=1e-6)
    assert in_processes(2, losses_of_a_rank, spec, expected) == [0, 0]


@pytest.mark.usefixtures("alone")
@torch.no_grad()
def test_passes_beyond_the_own_batches_are_made_and_count_for_nothing(tmp_path: Path) -> None:
    module, batches = module_of(make_spec(tmp_path / "run")), make_batches()
    passes: list[object] = []
    module.register_forward_hook(lambda *_: passes.append(None))
    alone = held_out_losses(module, batches, HERE, len(SIZES))
    assert held_out_losses(module, batches, HERE, len(SIZES) + 2) == alone
    assert len(passes) == 2 * len(SIZES) + 2


@pytest.mark.usefixtures("alone")
def test_a_rank_without_samples_is_named() -> None:
    with pytest.raises(TrainingError, match="rank 0: it has no held-out samples"):
        held_out_losses(StandIn(), [], HERE, 1)
