import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.data.ingest import shard_tasks
from pipeline.data.ingest.image_policy import ImagePolicy
from pipeline.data.ingest.ingest_plan import ShardPlan, plan_ingest
from pipeline.data.ingest.shard_tasks import run_tasks
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.sources.base import Source
from pipeline.errors import ShardError
from tests.data.world import Item, World

NUM_PLANS = 7


@pytest.fixture
def world() -> World:
    return World({f"key-{n}": Item(n, "words") for n in range(NUM_PLANS)})


@pytest.fixture
def plans(tmp_path: Path, world: World) -> list[ShardPlan]:
    """Plans of one record, named by their place."""
    plan = plan_ingest(world, Manifest.create(str(tmp_path)))
    found = plan.shards(samples_per_shard=1, policy=ImagePolicy())
    return [replace(shard, split=str(place)) for place, shard in enumerate(found)]


def place_of(plan: ShardPlan, _: Source) -> int:
    """The first takes longest."""
    time.sleep(0.3 if plan.split == "0" else 0.0)
    return int(plan.split)


def fail(plan: ShardPlan, _: Source) -> int:
    raise ShardError(f"{plan.split} is broken")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_of_one(plan: ShardPlan, _: Source) -> int:
    if "key-3" in plan.records["key"].to_pylist():
        die()
    return 0


def die_of_many(plan: ShardPlan, _: Source) -> int:
    if plan.records.num_rows == NUM_PLANS:
        die()
    return 0


def test_without_ray_plans_are_worked_on_one_after_the_other(
    plans: list[ShardPlan], world: World
) -> None:
    assert list(run_tasks(place_of, iter(plans), world, bound=0)) == list(range(NUM_PLANS))


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("in_order", [False, True])
def test_ray_works_on_every_plan_and_keeps_the_order_if_asked(
    plans: list[ShardPlan], world: World, in_order: bool
) -> None:
    found = list(run_tasks(place_of, iter(plans), world, bound=2, in_order=in_order))
    assert sorted(found) == list(range(NUM_PLANS))
    assert (found == sorted(found)) == in_order


@pytest.mark.usefixtures("ray_local")
def test_no_more_plans_are_taken_than_are_in_work(plans: list[ShardPlan], world: World) -> None:
    taken = []

    def counted() -> Iterator[ShardPlan]:
        for plan in plans:
            taken.append(plan)
            yield plan

    for done, _ in enumerate(run_tasks(place_of, counted(), world, bound=2), start=1):
        assert len(taken) <= done + 2


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("bound", [0, 2])
def test_an_error_of_ours_is_raised_as_itself(
    plans: list[ShardPlan], world: World, bound: int
) -> None:
    with pytest.raises(ShardError, match=r"is broken$"):
        list(run_tasks(fail, iter(plans), world, bound))


@pytest.mark.usefixtures("ray_local")
def test_the_record_that_kills_every_worker_is_named(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_tasks, "_RETRIES", 1)
    plan = plan_ingest(world, Manifest.create(str(tmp_path)))
    shards = plan.shards(samples_per_shard=NUM_PLANS, policy=ImagePolicy())
    with pytest.raises(ShardError, match=r"died 2 times .*: it dies of record 'key-3', .* alone"):
        list(run_tasks(die_of_one, shards, world, bound=2))


@pytest.mark.usefixtures("ray_local")
def test_where_no_single_record_kills_workers_the_shard_is_named(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_tasks, "_RETRIES", 1)
    plan = plan_ingest(world, Manifest.create(str(tmp_path)))
    shards = plan.shards(samples_per_shard=NUM_PLANS, policy=ImagePolicy())
    with pytest.raises(ShardError, match=rf"of {NUM_PLANS} records from .*; no single one"):
        list(run_tasks(die_of_many, shards, world, bound=2))
