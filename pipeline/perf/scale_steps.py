"""What is done with a dataset of any size, one step at a time, and what that took.

`python -m pipeline.perf.scale_steps STEP ARGUMENTS` takes a step and prints JSON, so that memory is
that of a process which has only what the step needs. Nothing here imports torch.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.data.ingest.ingest import IngestConfig, ingest
from pipeline.data.load.loader import Loader
from pipeline.data.load.order import Order
from pipeline.data.read.dataset import Dataset
from pipeline.errors import PipelineError
from pipeline.perf.own_process import begin_peak, in_its_own_process, peak_bytes
from pipeline.perf.scale_data import SPLIT, ScaleData, table_source

GLOBAL_BATCH_SIZE, WORLD_SIZE = 512, 8
_MORE_STEPS = 64  # behind the first batch, before memory is looked at again


@dataclass(frozen=True)
class Written:
    """What a synthetic dataset took to be made."""

    seconds: float
    peak_bytes: int  # of the whole process


@dataclass(frozen=True)
class Opened:
    """What a rank took to open a split and to read its first batch."""

    seconds: float
    processor_seconds: float
    peak_bytes: int  # above the imports, in these and some more batches


@dataclass(frozen=True)
class Ingested:
    """What a run took, and what for."""

    processor_seconds: float
    work_processor_seconds: float  # of these, what came behind the comparison with the manifest
    peak_bytes: int  # of the whole process
    num_added: int
    num_unchanged: int


Took = TypeVar("Took", Written, Opened, Ingested)


def take(step: str, kind: type[Took], *arguments: object) -> Took:
    """Takes a step in a process of its own; raises PipelineError if it fails."""
    return in_its_own_process("pipeline.perf.scale_steps", kind, step, *arguments)


def write(folder: str, num_samples: int, num_shards: int) -> Written:
    """Makes a synthetic dataset."""
    start = time.perf_counter()
    ScaleData(Path(folder), num_samples, num_shards).write()
    return Written(time.perf_counter() - start, peak_bytes())


def open_split(url: str) -> Opened:
    """Opens a split as one of eight ranks does, and reads."""
    before = begin_peak()
    start, processor_start = time.perf_counter(), time.process_time()
    split = Dataset.open(url).split(SPLIT)
    order = Order(split, "captions", seed=1)
    loader = Loader(split, order, global_batch_size=GLOBAL_BATCH_SIZE, seed=1)
    share = GLOBAL_BATCH_SIZE // WORLD_SIZE
    batches = loader.batches(0, 1 + _MORE_STEPS, 0, WORLD_SIZE, share)
    next(batches)
    seconds, processor_seconds = (
        time.perf_counter() - start,
        time.process_time() - processor_start,
    )
    for _ in batches:
        pass
    return Opened(seconds, processor_seconds, peak_bytes() - before)


def run_ingest(table: str, url: str) -> Ingested:
    """Ingests a table."""
    compared: list[float] = []

    def note_progress(_num_done: int, _num_to_do: int) -> None:
        compared.append(time.process_time())  # first when all is compared and nothing written

    start = time.process_time()
    report = ingest(table_source(Path(table)), url, IngestConfig(shards_in_flight=0), note_progress)
    end = time.process_time()
    return Ingested(
        processor_seconds=end - start,
        work_processor_seconds=end - compared[0],
        peak_bytes=peak_bytes(),
        num_added=report.num_added,
        num_unchanged=report.num_unchanged,
    )


def main(step: str, *arguments: str) -> None:
    """Takes a step and prints what it took."""
    took: Any
    match step:
        case "write":
            folder, num_samples, num_shards = arguments
            took = write(folder, int(num_samples), int(num_shards))
        case "open":
            took = open_split(*arguments)
        case "ingest":
            took = run_ingest(*arguments)
        case _:
            raise PipelineError(f"there is no step {step!r}")
    print(json.dumps(asdict(took)))


if __name__ == "__main__":
    main(*sys.argv[1:])
