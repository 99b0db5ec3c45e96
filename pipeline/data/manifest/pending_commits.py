"""Pending commits: finished work that waits to be listed, for a second at most."""

import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

COMMIT_SECONDS = 1.0  # the most work a kill can cost; a commit takes a hundredth of it

Work = TypeVar("Work")


class PendingCommits(Generic[Work]):
    """Hands finished work to a commit, together with what was finished shortly before."""

    def __init__(self, commit: Callable[[Sequence[Work]], object]) -> None:
        self._commit = commit
        self._pending: list[Work] = []
        self._committed_at = time.monotonic()

    def add(self, work: Work, is_last: bool = False) -> None:
        """Commits what is pending if this is the last, or a second is over since a commit."""
        self._pending.append(work)
        if is_last or time.monotonic() - self._committed_at >= COMMIT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Commits what is pending, if anything is."""
        if self._pending:
            self._commit(self._pending)
            self._pending = []
            self._committed_at = time.monotonic()
