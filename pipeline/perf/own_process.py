"""A process of its own: what is measured there has the memory of what it needs, and no more."""

import json
import subprocess
import sys
from pathlib import Path
from typing import TypeVar

from pipeline.errors import PipelineError

Took = TypeVar("Took")


def in_its_own_process(module: str, kind: type[Took], *arguments: object) -> Took:
    """Runs a module, which prints a `kind` as JSON; raises PipelineError if it fails."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    package = Path(__file__).parents[2]  # not the working folder, whose modules would come first
    done = subprocess.run(command, cwd=package, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PipelineError(f"{' '.join([module, *map(str, arguments)])}: {done.stderr.strip()}")
    return kind(**json.loads(done.stdout))


def begin_peak() -> int:
    """Forgets the peak up to now; returns what the process holds."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """Returns the most memory this process had: `getrusage` begins with its parent's peak."""
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    (found,) = (line.split()[1] for line in status.splitlines() if line.startswith(f"{name}:"))
    return int(found) * 1024
