"""Checkpoints: a training state that any world size and any ZeRO stage can continue from.

A checkpoint is a folder `step-00001000` of safetensors files, one per rank, and a
`manifest.json`, written last, that names every file with its size and digest, says in which file
each tensor is, and ends in a digest of itself. Each tensor is whole, in fp32, and in one file
only. What else a step needs is the run state and arithmetic: the place in the data, the learning
rate and the random numbers are functions of the step and the seed, so the step is the whole of the
loader's and the scheduler's state.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline import storage
from pipeline.digest import digest_of, digest_of_file
from pipeline.errors import CheckpointError, StorageError
from pipeline.training.checkpoints.run_state import RunState

FORMAT = 4
# Read, no longer written: other names for two of a manifest's fields, and none for its own digest.
RENAMED_FORMAT, UNDIGESTED_FORMAT = 3, 2
CHECKPOINTS = "checkpoints"  # RUN/<phase>/checkpoints
MANIFEST = "manifest.json"

_NAME = re.compile(r"step-(\d{8})")
_PARTIAL = ".partial"

Result = TypeVar("Result")
ReadTensor = Callable[[str], Tensor]


@dataclass(frozen=True)
class File:
    """One rank's part of a checkpoint."""

    name: str
    size_bytes: int
    digest: str  # xxh3_128 of the bytes, hexadecimal


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds and who wrote it."""

    step: int  # steps done
    written: float  # when the state was copied, in seconds since 1970
    run_state: RunState
    reproducibility_key: dict[str, Any]  # what the loss curve is a function of
    world_size: int
    zero_stage: int
    precision: str
    files: tuple[File, ...]
    tensors: dict[str, str]  # tensor -> file
    format: int = FORMAT


@dataclass(frozen=True)
class Writer:
    """The run that checkpoints are written by and read for."""

    reproducibility_key: dict[str, Any]
    zero_stage: int
    precision: str


def name_of(step: int) -> str:
    """Returns the folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def steps_in(folder: str) -> list[int]:
    """Returns the steps that have a published checkpoint, damaged or not, in rising order."""
    names = (_NAME.fullmatch(name) for name in storage.list_names(folder))
    steps = sorted(int(match[1]) for match in names if match)
    if storage.is_local(folder):
        return steps
    manifests = {step: storage.join(folder, name_of(step), MANIFEST) for step in steps}
    return [step for step, manifest in manifests.items() if storage.exists(manifest)]


class Saving:
    """A checkpoint on its way into its folder: written by a thread while training goes on.

    Making one is collective: every rank gives the same names in the same order, and goes on once
    its part is copied. `finish` is collective too and publishes: the checkpoint appears under its
    name whole or, on any failure, not at all.
    """

    def __init__(
        self,
        folder: str,
        step: int,
        states: Iterator[tuple[str, Tensor]],
        run_state: RunState,
        writer: Writer,
    ) -> None:
        """Raises CheckpointError on every rank, naming the one that failed."""
        began = time.perf_counter()
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.step = step
        self.run_state = run_state
        self.written = time.time()
        self._writer = writer
        self._final = storage.join(folder, name_of(step))
        # An object store has no rename; there the manifest, written last, is what publishes.
        self._target = self._final + (_PARTIAL if storage.is_local(folder) else "")
        _on_all_ranks(
            f"checkpoint {self._final}",
            lambda: storage.remove(self._target) if rank == 0 else None,
        )
        mine: dict[str, Tensor] = {}
        self._owners: dict[str, int] = {}
        written_bytes = [0] * world_size
        for name, tensor in states:
            owner = written_bytes.index(min(written_bytes))
            written_bytes[owner] += tensor.nbytes
            self._owners[name] = owner
            if owner == rank:
                mine[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self.seconds_copying = time.perf_counter() - began
        self.seconds_writing = 0.0
        thread = ThreadPoolExecutor(1, thread_name_prefix="write-checkpoint")
        self._part: Future[File] = thread.submit(self._write, rank, mine)
        thread.shutdown(wait=False)  # it ends by itself when the part is written

    def is_written(self) -> bool:
        """Whether this rank's part is on the disk, or has failed to get there."""
        return self._part.done()

    def wait(self) -> None:
        """Returns when this rank's thread has ended. Not collective, and publishes nothing."""
        wait([self._part])

    def finish(self) -> str:
        """Waits for every rank's part and publishes; returns the location.

        Raises CheckpointError on every rank, naming the one that failed.
        """
        what = f"checkpoint {self._final}"
        rank = torch.distributed.get_rank()
        try:
            files = _on_all_ranks(what, self._part.result)
            _on_all_ranks(what, lambda: self._publish(files) if rank == 0 else None)
        except CheckpointError:
            if rank == 0:
                storage.remove(self._target)
            raise
        return self._final

    def _write(self, rank: int, tensors: dict[str, Tensor]) -> File:
        began = time.perf_counter()
        location = storage.join(self._target, f"rank-{rank:05d}.safetensors")
        with storage.publish(location, durable=True) as path:
            save_file(tensors, path)
            size_bytes, digest = path.stat().st_size, digest_of_file(path)
        self.seconds_writing = time.perf_counter() - began
        return File(location.rsplit("/", 1)[-1], size_bytes, digest)

    def _publish(self, files: list[File]) -> None:
        manifest = Manifest(
            step=self.step,
            written=self.written,
            run_state=self.run_state,
            reproducibility_key=self._writer.reproducibility_key,
            world_size=len(files),
            zero_stage=self._writer.zero_stage,
            precision=self._writer.precision,
            files=tuple(files),
            tensors={name: files[owner].name for name, owner in self._owners.items()},
        )
        with storage.publish(storage.join(self._target, MANIFEST), durable=True) as path:
            path.write_bytes(_rendered(asdict(manifest)))
        if self._target != self._final:
            storage.remove(self._final)
            storage.local_path(self._target).rename(storage.local_path(self._final))


def newest(folder: str, cache: Path, damaged: Callable[[str], None]) -> Manifest | None:
    """Returns the manifest of the latest checkpoint whose every byte is as it was written.

    `damaged` is told of each later one that is not, and why. `cache` holds local copies of what
    lies in an object store. None if there is no checkpoint; CheckpointError if none is whole.
    """
    faults = []
    for step in reversed(steps_in(folder)):
        location = storage.join(folder, name_of(step))
        try:
            return verify(location, cache)
        except CheckpointError as error:
            faults.append(str(error))
            damaged(str(error))
    if faults:
        of_phase = folder.rstrip("/").rpartition("/")[0]
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise CheckpointError(
            f"{folder}: none of the checkpoints is whole:{listed}\nTraining does not begin anew "
            "unasked. Put an undamaged copy of one of them back, or give --restart, which moves "
            f"{of_phase} aside, deletes nothing and trains from the first step"
        )
    return None


def verify(location: str, cache: Path) -> Manifest:
    """Returns a checkpoint's manifest, or raises CheckpointError saying what is damaged."""
    manifest = read_manifest(location)
    for file in manifest.files:
        try:
            path = storage.local_copy(storage.join(location, file.name), cache)
            found = File(file.name, path.stat().st_size, digest_of_file(path))
        except (StorageError, OSError) as error:
            raise CheckpointError(f"{location}: {file.name} cannot be read: {error}") from error
        if found != file:
            raise CheckpointError(
                f"{location}: {file.name} is damaged: {file.size_bytes} bytes with digest "
                f"{file.digest} were written, found {found.size_bytes} with {found.digest}"
            )
    return manifest


def read_manifest(location: str) -> Manifest:
    """Reads a checkpoint's manifest, or raises CheckpointError."""
    where = storage.join(location, MANIFEST)
    try:
        payload = storage.read_bytes(where)
        document = json.loads(payload)
        digest = document.pop("digest", None)
        is_whole = payload == _rendered(document)
        if document["format"] in (RENAMED_FORMAT, UNDIGESTED_FORMAT):
            for now, then in (("run_state", "tally"), ("reproducibility_key", "sequence")):
                document[now] = document.pop(then)
        files = tuple(File(**file) for file in document.pop("files"))
        run_state = RunState(**document.pop("run_state"))
        manifest = Manifest(files=files, run_state=run_state, **document)
        name = name_of(manifest.step)
    except StorageError as error:
        raise CheckpointError(f"{where} cannot be read: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: {error}") from error
    is_known = manifest.format in (FORMAT, RENAMED_FORMAT, UNDIGESTED_FORMAT)
    if not is_known or name != location.rsplit("/", 1)[-1]:
        raise CheckpointError(
            f"{where}: expected format {FORMAT} and the step in the folder's name, "
            f"found format {manifest.format} and step {manifest.step}"
        )
    if not is_whole and not (manifest.format == UNDIGESTED_FORMAT and digest is None):
        raise CheckpointError(f"{where} is damaged: its content is not what its digest is of")
    return manifest


def _rendered(document: dict[str, Any]) -> bytes:
    """Returns the file of a manifest: every byte of it follows from its content."""
    digest = digest_of(json.dumps(document, indent=1).encode())
    return json.dumps(document | {"digest": digest}, indent=1).encode()


def reader(location: str, manifest: Manifest, cache: Path) -> ReadTensor:
    """Returns a function from a tensor's name to the tensor; one tensor is in memory at a time."""

    def read(name: str) -> Tensor:
        if name not in manifest.tensors:
            raise CheckpointError(f"{location}: it has no tensor {name!r}; another model wrote it")
        path = storage.local_copy(storage.join(location, manifest.tensors[name]), cache)
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    return read


def weights(manifest: Manifest, read: ReadTensor, ema: bool) -> dict[str, Tensor]:
    """Returns the module's state dict in fp32; `ema` gives the weights' moving average.

    A frozen parameter has no average, and is what it was.
    """
    found = {}
    for tensor in manifest.tensors:
        kind, name = tensor.split("/", 1)
        if kind in ("weight", "buffer"):
            average = f"average/{name}"
            uses_average = ema and kind == "weight" and average in manifest.tensors
            found[name] = read(average if uses_average else tensor)
    return found


def remove_leftovers(folder: str) -> None:
    """Removes what a killed writer left unpublished. Only one run may write to a folder."""
    for name in storage.list_names(folder):
        if name.endswith(_PARTIAL):
            storage.remove(storage.join(folder, name))


def _on_all_ranks(what: str, work: Callable[[], Result]) -> list[Result]:
    """Returns every rank's result, or raises CheckpointError on all of them if one failed."""
    outcome: tuple[Result | None, str | None]
    try:
        outcome = (work(), None)
    except (OSError, StorageError, SafetensorError) as error:
        outcome = (None, str(error))
    outcomes: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(outcomes, outcome)
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise CheckpointError(f"{what}: rank {rank} could not write its part: {failure}")
    return [result for result, _ in outcomes]
