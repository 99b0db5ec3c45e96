"""Stage records in RUN/stages: enough to tell whether a stage must run again.

A stage is up to date when it was finished with the same identity: the identities of its inputs,
its part of the recipe, and the version of the code that made it. A stage that was started and
not finished is `running` and is never taken for done.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline import storage

Outputs = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: `done` if it did work, `up to date` if there was none."""

    state: str
    seconds: float
    outputs: Outputs


@dataclass(frozen=True)
class Record:
    """The content of RUN/stages/<stage>.json. `seconds` is what the work took when it was done."""

    identity: str
    state: str  # running | done
    seconds: float
    outputs: Outputs

    @classmethod
    def read(cls, run: str, stage: str) -> "Record | None":
        """Returns what the stage left, or None if it never started, or nobody can read it."""
        location = _location(run, stage)
        if not storage.exists(location):
            return None
        try:
            found = cls(**json.loads(storage.read_bytes(location)))
        except (ValueError, TypeError):  # the stage looks for itself at what is done
            return None
        texts, seconds = (found.identity, found.state), found.seconds
        is_whole = all(isinstance(text, str) for text in texts) and isinstance(found.outputs, dict)
        return found if is_whole and isinstance(seconds, int | float) else None

    def write(self, run: str, stage: str) -> None:
        payload = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        storage.write_bytes(_location(run, stage), payload.encode())


def identity(parts: Mapping[str, Any]) -> str:
    """Returns a digest that is equal if and only if all parts are equal as JSON."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def once(
    run: str,
    stage: str,
    parts: Mapping[str, Any],
    work: Callable[[], Outputs],
    leaves: Sequence[str] = (),
) -> Outcome:
    """Does the work unless it was finished with the same parts; remembers that it was.

    `leaves` are locations that the work makes: if one has gone it is done again. Work that was
    interrupted is called again and may continue where it stopped. What an earlier identity left is
    for the work to replace or to keep: nothing is removed here.
    """
    wanted = identity(parts)
    before = Record.read(run, stage)
    whole = all(storage.exists(location) for location in leaves)
    if before and before.identity == wanted and before.state == "done" and whole:
        return Outcome("up to date", before.seconds, before.outputs)
    Record(wanted, "running", 0.0, {}).write(run, stage)
    started = time.monotonic()
    outputs = work()
    outcome = Outcome("done", time.monotonic() - started, outputs)
    Record(wanted, "done", outcome.seconds, outputs).write(run, stage)
    return outcome


def _location(run: str, stage: str) -> str:
    return storage.join(run, "stages", f"{stage}.json")
