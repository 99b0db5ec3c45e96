"""Followers of what phases log, in a thread of the process that launched them."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.training.spec import TrainingSpec

SECONDS_BETWEEN_READS = 0.2

Progress = Callable[[dict[str, Any]], None]


@contextlib.contextmanager
def following(specs: Sequence[TrainingSpec], listeners: Sequence[Progress]) -> Iterator[None]:
    """Calls the listeners from a thread with the lines that the phases log inside the block."""
    from pipeline.training.tracking.metrics_log import EVENTS, METRICS, Follower

    logs = [
        (spec.phase, Follower(spec.folder, name)) for spec in specs for name in (EVENTS, METRICS)
    ]

    def read() -> None:
        for phase, log in logs:
            for line in log.new_lines():
                for listener in listeners:
                    listener({"phase": phase, **line})

    def read_until_done() -> None:
        while not done.wait(SECONDS_BETWEEN_READS):
            read()

    done = threading.Event()
    thread = threading.Thread(target=read_until_done, name="follow-training", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        read()
