"""The split of the tests: those that stay in the process they run in, and those that start others.

A test is marked `processes` if it, or a fixture that it uses, starts Ray, a server or any other
process. Those of the fixtures named here are marked by themselves. `pytest --fast` leaves them
out, and the tests marked `slow`; a test that is left and starts a process fails, so that the split
stays true.
"""

import multiprocessing.util
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

# Fixtures of which a process of their own is part.
FIXTURES = frozenset({"ray_local", "plain_head", "token_head", "s3_endpoint"})
# Values of a parameter, of which one is the `object_store` of a fixture.
DISK_AND_OBJECT_STORE = ("disk", pytest.param("object store", marks=pytest.mark.processes))
# What Python tells of as a process begins, whoever starts it.
EVENTS = frozenset(
    {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system"}
)
TOOLS = frozenset({"git", "numactl", "rm", "tar", "uname"})  # of the system: they come back at once


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help="leave out tests that start processes or are slow"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--fast"):
        config.pluginmanager.register(ProcessWatch())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("processes")
    if config.getoption("--fast"):
        left_out = [item for item in items if is_left_out(item)]
        items[:] = [item for item in items if not is_left_out(item)]
        config.hook.pytest_deselected(items=left_out)


def is_left_out(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in ("processes", "slow"))


class ProcessWatch:
    """Fails a test in whose set-up, call or tear-down a process was started."""

    def __init__(self) -> None:
        self._started: list[str] = []
        sys.addaudithook(self._on_event)
        # Of its `spawn` and `forkserver`, Python does not tell.
        spawn = multiprocessing.util.spawnv_passfds

        def told(path: Any, args: Any, passfds: Any) -> int:
            self._started.append(f"multiprocessing: {path}")
            return spawn(path, args, passfds)

        multiprocessing.util.spawnv_passfds = told

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS:
            return
        started = [str(argument) for argument in arguments[:2]]
        if not started or Path(started[0]).name not in TOOLS:
            self._started.append(" ".join([f"{event}:", *started]))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self) -> Generator[None, Any, Any]:
        return (yield from self._watched())

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self) -> Generator[None, Any, Any]:
        return (yield from self._watched())

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self) -> Generator[None, Any, Any]:
        return (yield from self._watched())

    def _watched(self) -> Generator[None, Any, Any]:
        self._started.clear()
        result = yield
        if self._started:
            pytest.fail(
                "a test that starts a process is to be marked `processes` (tests/processes.py): "
                + "; ".join(self._started),
                pytrace=False,
            )
        return result
