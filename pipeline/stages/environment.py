"""RUN/environment.json: versions, machine, code revision, seeds and data of a run.

`versions` are those of each dataset that the run has read, and `stretches` the parts of each
phase's curve that have settings of their own: after which step, which settings changed and how,
when, and on which version of the dataset.
"""

import contextlib
import json
import os
import platform
import subprocess
import sys
from collections import defaultdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline import __version__, storage
from pipeline.errors import TrainingError
from pipeline.recipe import Recipe
from pipeline.stages.state import Record
from pipeline.training.launch.recorded_spec import read_spec
from pipeline.training.tracking.metrics_log import read_stretches

PHASES = ("pretrain", "finetune", "blind")

LIBRARIES = (
    "torch",
    "torchvision",
    "ray",
    "deepspeed",
    "transformers",
    "tokenizers",
    "safetensors",
    "deltalake",
    "pyarrow",
    "numpy",
    "pillow",
    "simplejpeg",
    "pycocoevalcap",
)


def write_environment(recipe: Recipe) -> None:
    """Writes RUN/environment.json; what earlier stages found of the data goes in as well."""
    found: dict[str, Any] = {
        "sightline": __version__,
        "code_revision": _code_revision(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "seed": recipe.training.seed,
        "workers": recipe.cluster.workers,
        "min_workers": recipe.cluster.min_workers,
        "gpus_per_worker": recipe.cluster.gpus_per_worker,
        "dataset": recipe.dataset.path,
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    found["versions"] = {url: sorted(versions) for url, versions in _versions(recipe).items()}
    found["stretches"] = _stretches(recipe.run)
    extracted = Record.read(recipe.run, "extract")
    if extracted:
        found["features"] = extracted.outputs.get("features")
    payload = json.dumps(found, indent=2, ensure_ascii=False).encode()
    storage.write_bytes(storage.join(recipe.run, "environment.json"), payload)


def _versions(recipe: Recipe) -> dict[str, set[int]]:
    """Returns which versions the run has read of each dataset: what a compaction can keep."""
    found: defaultdict[str, set[int]] = defaultdict(set)
    ingested = Record.read(recipe.run, "ingest")
    if ingested:
        found[storage.absolute(recipe.dataset.path)].add(ingested.outputs["version"])
    for folder in storage.list_names(recipe.run):
        if folder.split(".", 1)[0] not in PHASES:  # those that were moved aside count as well
            continue
        with contextlib.suppress(TrainingError):  # nothing is trained yet
            spec = read_spec(storage.join(recipe.run, folder))
            found[spec.dataset].add(spec.dataset_version)
            for other in spec.mixed_in:
                found[other.dataset].add(other.dataset_version)
    return found


def _stretches(run: str) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for phase in PHASES:
        stretches = read_stretches(storage.join(run, phase))
        if stretches:
            found[phase] = [
                {
                    "after_step": one.step,
                    "began": datetime.fromtimestamp(one.time, UTC).isoformat(timespec="seconds"),
                    "dataset_version": one.dataset_version,
                    "changed": {
                        key: {"then": then, "now": now} for key, (then, now) in one.changed.items()
                    },
                }
                for one in stretches
            ]
    return found


def _code_revision() -> str | None:
    """Returns the checkout's commit, with `+changes` if it has any; None if it is no checkout."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    git = ["git", "-C", str(folder)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True)
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.decode().strip() + ("+changes" if status.stdout.strip() else "")
