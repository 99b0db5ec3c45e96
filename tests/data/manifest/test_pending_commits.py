import pytest

from pipeline.data.manifest import pending_commits
from pipeline.data.manifest.pending_commits import PendingCommits


def test_work_is_committed_together_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending_commits, "COMMIT_SECONDS", float("inf"))
    commits: list[list[int]] = []
    pending = PendingCommits[int](lambda work: commits.append(list(work)))
    pending.add(1)
    pending.add(2)
    assert commits == []
    pending.add(3, is_last=True)
    pending.flush()
    assert commits == [[1, 2, 3]]


def test_work_is_committed_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending_commits, "COMMIT_SECONDS", 0.0)
    commits: list[list[int]] = []
    pending = PendingCommits[int](lambda work: commits.append(list(work)))
    pending.add(1)
    pending.add(2)
    assert commits == [[1], [2]]


def test_what_is_left_is_committed_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending_commits, "COMMIT_SECONDS", float("inf"))
    commits: list[list[int]] = []
    pending = PendingCommits[int](lambda work: commits.append(list(work)))
    pending.add(1)
    pending.flush()
    pending.add(2)
    pending.flush()
    assert commits == [[1], [2]]
