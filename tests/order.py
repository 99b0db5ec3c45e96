"""The order of the tests, and how they are dealt out to the processes of pytest-xdist.

The longest begin first, so that the processes end together. The tests of a file stay in one
process, which so makes each of its fixtures once, and those of the shared Ray in one too: an idle
Ray takes a tenth of a processor. Only of files that take minutes and share nothing each test is
dealt out by itself.
"""

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

SHARING_RAY = (
    "tests/training/launch/test_ray_train.py",
    "tests/training/launch/test_process_group.py",
    "tests/training/launch/test_gauges.py",
    "tests/vision/test_extract.py",
    "tests/data/ingest/test_ingest.py",
    "tests/data/ingest/test_shard_tasks.py",
    "tests/data/ingest/test_survey.py",
    "tests/test_resources.py",
)
# Files by the seconds that they take, on two cores; those not named take less than a few.
LONGEST = (
    *SHARING_RAY,
    "tests/stages/test_submit.py",
    "tests/test_cluster.py",
    "tests/stages/test_stopping.py",
    "tests/perf/test_train.py",
    "tests/perf/test_extract.py",
    "tests/training/test_loop.py",
    "tests/stages/test_busy.py",
    "tests/data/test_chaos.py",
    "tests/jobs/test_recipes.py",
    "tests/training/test_assembly.py",
    "tests/training/engine/test_swapped_state.py",
    "tests/objectives/test_families.py",
    "tests/training/test_live.py",
    "tests/stages/test_run.py",
    "tests/data/upkeep/test_compact.py",
    "tests/models/test_families.py",
    "tests/benchmarks/test_caption_metrics.py",
    "tests/objectives/test_itc.py",
    "tests/models/test_generation.py",
    "tests/vision/extractors/detection/test_regions.py",
)
DEALT_OUT_SINGLY = (
    "tests/data/test_chaos.py",
    "tests/jobs/test_recipes.py",
    "tests/objectives/test_families.py",
    "tests/training/test_loop.py",
)


def unit_of(test: str) -> str:
    """Returns what a test is dealt out with, by the test's id."""
    file = test.split("::")[0]
    if file in DEALT_OUT_SINGLY:
        return test
    return "ray" if file in SHARING_RAY else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {file: rank for rank, file in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.nodeid.split("::")[0], len(ranks)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    config.option.loadscopereorder = False  # xdist would begin with the files of most tests
    return LongestFirst(config, log)


class LongestFirst(LoadScopeScheduling):  # type: ignore[misc]
    """Deals out unit after unit in the order of the tests."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)
