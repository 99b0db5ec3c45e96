"""`sightline bench scale`: what a dataset costs by its size, beside its goals and peers."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt

from pipeline.config import Config
from pipeline.errors import PipelineError
from pipeline.perf import measure
from pipeline.perf.result import Comparison, Figure, Goals, Result
from pipeline.perf.scale_data import ScaleData, write_table
from pipeline.perf.scale_steps import Ingested, Opened, Written, take

PEERS = ("streaming", "litdata", "energon")
OURS = "ours"
_MB, _MIB = 10**6, 2**20
_TENTH = 10
_SCRIPT = Path(__file__).with_name("scale_peers.py")


class ScaleBenchConfig(Config):
    """What is measured. By default a minute or two; the goals are for 20,000,000 in 20,000."""

    samples: PositiveInt = 200_000
    shards: PositiveInt = 200
    inserted: PositiveInt = 10_000  # records that a run adds
    # An interpreter that has peers: mosaicml-streaming, litdata, megatron-energon, all or some.
    peers: str | None = None
    folder: str | None = None  # where the data is made, and removed; None: a temporary one


def run(config: ScaleBenchConfig, show: Callable[[Goals | Comparison], None]) -> Result:
    """Measures each step in a process of its own, from page cache.

    Raises PipelineError if a run did other work than it should have.
    """
    with tempfile.TemporaryDirectory(prefix="sightline-bench-", dir=config.folder) as folder:
        goals, opened = _goals(config, Path(folder))
        show(goals)
        peers = _peers(config, Path(folder), opened)
        show(peers)
    machine = measure.machine(torch.device("cpu"))
    return Result("scale", config.model_dump(mode="json"), machine, [peers], goals)


def _goals(config: ScaleBenchConfig, folder: Path) -> tuple[Goals, Opened]:
    num_small = max(config.samples // _TENTH, 1)
    small = ScaleData(folder / "small", num_small, max(config.shards // _TENTH, 1))
    whole = ScaleData(folder / "whole", config.samples, config.shards)
    for data in (small, whole):
        written = take("write", Written, data.folder, data.num_samples, data.num_shards)
    first = {data: _open(data) for data in (small, whole)}
    again = {data: _open(data) for data in (small, whole)}
    rerun = {data: _unchanged(data) for data in (small, whole)}
    added, alone = _inserted(config, whole, folder)
    listed = rerun[whole]
    figures = [
        Figure(
            "a rank opens a split, first batch",
            again[whole].seconds,
            3,
            "s",
            again[small].seconds,
        ),
        Figure(
            "its memory above the imports",
            again[whole].peak_bytes / _MB,
            100,
            "MB",
            again[small].peak_bytes / _MB,
        ),
        Figure(
            "its growth from a tenth of the size",
            again[whole].peak_bytes / again[small].peak_bytes,
            1.2,
        ),
        Figure(
            "unchanged re-run of a Parquet listing, peak",
            listed.peak_bytes / _MIB,
            2048,
            "MiB",
            rerun[small].peak_bytes / _MIB,
        ),
        Figure(
            "the same, processor time",
            listed.processor_seconds,
            60,
            "s",
            rerun[small].processor_seconds,
        ),
        Figure(
            f"{config.inserted:,} records inserted, to as many alone",
            added.work_processor_seconds / alone.work_processor_seconds,
            1.1,
        ),
    ]
    notes = [
        f"the first rank to open this version took {first[whole].seconds:.1f} s and "
        f"{first[whole].peak_bytes / _MB:,.0f} MB above the imports, of a tenth of the size "
        f"{first[small].seconds:.1f} s and {first[small].peak_bytes / _MB:,.0f} MB; the next "
        f"{again[whole].processor_seconds:.2f} s of processor time",
        f"inserted among the others {config.inserted:,} records took "
        f"{added.work_processor_seconds:.2f} s of processor time beyond the comparison, which took "
        f"{added.processor_seconds - added.work_processor_seconds:.2f} s; alone "
        f"{alone.work_processor_seconds:.2f} s",
        f"the synthetic rows were written in {written.seconds:.0f} s, with at most "
        f"{written.peak_bytes / _MIB:,.0f} MiB",
    ]
    title = f"{config.samples:,} samples in {config.shards:,} shards"
    return Goals(title, figures, notes), again[whole]


def _open(data: ScaleData) -> Opened:
    return take("open", Opened, data.url)


def _unchanged(data: ScaleData) -> Ingested:
    took = take("ingest", Ingested, data.table, data.url)
    if took.num_unchanged != data.num_samples or took.num_added:
        raise PipelineError(f"{took.num_unchanged} of {data.num_samples} records were unchanged")
    return took


def _inserted(config: ScaleBenchConfig, data: ScaleData, folder: Path) -> tuple[Ingested, Ingested]:
    """Ingests the same new records beside the old ones, and into a dataset of their own."""
    numbers = 2 * (np.arange(config.inserted) * data.num_samples // config.inserted) + 1
    if len(np.unique(numbers)) < len(numbers):
        raise PipelineError(f"inserted={config.inserted} is more than samples={data.num_samples}")
    only = folder / "alone" / "table"
    write_table(only / "1.parquet", numbers)
    alone = take("ingest", Ingested, only, folder / "alone" / "dataset")
    shutil.copy(only / "1.parquet", data.table)
    added = take("ingest", Ingested, data.table, data.url)
    for took in (alone, added):
        if took.num_added != config.inserted:
            raise PipelineError(f"{took.num_added} of {config.inserted} records were added")
    return added, alone


def _peers(config: ScaleBenchConfig, folder: Path, ours: Opened) -> Comparison:
    seconds, memory = {OURS: ours.seconds}, {OURS: ours.peak_bytes}
    versions, absent = [], []
    for peer in PEERS:
        found = _peer(config, peer, folder / peer)
        if isinstance(found, str):
            absent.append(found)
            continue
        seconds[peer], memory[peer] = found["seconds"], found["peak_bytes"]
        versions.append(f"{peer} {found['version']}")
        shutil.rmtree(folder / peer, ignore_errors=True)
    notes = [
        "each in a process of its own, memory above its imports; ours is one of eight ranks and "
        "its memory that of 65 steps, a peer is alone and reads one batch; of energon's SQLite "
        "index only one tar's samples are there"
    ]
    notes += [", ".join(versions)] if versions else []
    notes += [f"not here to compare with: {'; '.join(absent)}"] if absent else []
    return Comparison(
        "one rank opens the dataset and reads a batch",
        seconds,
        {name: ours.seconds / took for name, took in seconds.items()},
        columns={"MB": {name: f"{peak / _MB:,.0f}" for name, peak in memory.items()}},
        notes=notes,
        figures={f"{name}_bytes": peak for name, peak in memory.items()},
    )


def _peer(config: ScaleBenchConfig, peer: str, folder: Path) -> dict[str, Any] | str:
    """Returns what a peer took, or why it has no part in this."""
    if config.peers is None:
        return f"{peer} (peers=PYTHON names an interpreter that has it)"
    command = [config.peers, str(_SCRIPT), peer, str(folder)]
    command += [str(config.samples), str(config.shards)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{peer} ({config.peers}: {error.strerror})"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return f"{peer} ({lines[-1]})"
    took: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return took
