"""A training state to files that any world size and any ZeRO stage can continue from.

A checkpoint is a folder `step-00001000` of safetensors files, one per rank, and a
`manifest.json`, written last, that names every file with its size and digest and says in which
file each tensor is. Each tensor is whole, in fp32, and in one file only. What else a step needs
is arithmetic: the place in the data, the learning rate and the random numbers are functions of
the step and the seed, so the step is the whole of the loader's and the scheduler's state.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline import storage
from pipeline.errors import CheckpointError, StorageError

FORMAT = 1
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

    step: int  # updates done
    sequence: dict[str, Any]  # what the loss curve is a function of
    world_size: int
    zero_stage: int
    precision: str
    files: tuple[File, ...]
    tensors: dict[str, str]  # tensor -> file
    format: int = FORMAT


@dataclass(frozen=True)
class Writer:
    """The run that checkpoints are written by and read for."""

    sequence: dict[str, Any]
    zero_stage: int
    precision: str


def name_of(step: int) -> str:
    """Returns the folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def steps_in(folder: str) -> list[int]:
    """Returns the steps that have a published checkpoint, damaged or not, in rising order."""
    names = (_NAME.fullmatch(name) for name in storage.list_names(folder))
    return sorted(int(match[1]) for match in names if match)


def save(folder: str, step: int, states: Iterator[tuple[str, Tensor]], writer: Writer) -> str:
    """Writes a checkpoint that appears under its name whole or, on any failure, not at all.

    Collective: every rank calls it with the same names in the same order. Returns the location.
    Raises CheckpointError on every rank, naming the one that failed.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    final = storage.join(folder, name_of(step))
    # An object store has no rename; there the manifest, written last, is what publishes.
    target = final + _PARTIAL if storage.is_local(final) else final
    mine: dict[str, Tensor] = {}
    owners: dict[str, int] = {}
    written_bytes = [0] * world_size
    for name, tensor in states:
        owner = written_bytes.index(min(written_bytes))
        written_bytes[owner] += tensor.nbytes
        owners[name] = owner
        if owner == rank:
            mine[name] = tensor.detach().to("cpu", copy=True).contiguous()

    def write() -> File:
        return _write_tensors(storage.join(target, f"rank-{rank:05d}.safetensors"), mine)

    def publish(files: list[File]) -> None:
        if rank:
            return
        manifest = Manifest(
            step=step,
            sequence=writer.sequence,
            world_size=world_size,
            zero_stage=writer.zero_stage,
            precision=writer.precision,
            files=tuple(files),
            tensors={name: files[owner].name for name, owner in owners.items()},
        )
        payload = json.dumps(asdict(manifest), indent=1).encode()
        with storage.publish(storage.join(target, MANIFEST), durable=True) as path:
            path.write_bytes(payload)
        if target != final:
            storage.remove(final)
            storage.local_path(target).rename(storage.local_path(final))

    what = f"checkpoint {final}"
    try:
        _on_all_ranks(what, lambda: storage.remove(target) if rank == 0 else None)
        files = _on_all_ranks(what, write)
        _on_all_ranks(what, lambda: publish(files))
    except CheckpointError:
        if rank == 0:
            storage.remove(target)
        raise
    return final


def newest(folder: str, cache: Path, damaged: Callable[[str], None]) -> Manifest | None:
    """Returns the manifest of the latest checkpoint whose every byte is as it was written.

    `damaged` is told of each later one that is not, and why. `cache` holds local copies of what
    lies in an object store. None if there is no checkpoint, or no whole one.
    """
    for step in reversed(steps_in(folder)):
        location = storage.join(folder, name_of(step))
        try:
            return verify(location, cache)
        except CheckpointError as error:
            damaged(str(error))
    return None


def verify(location: str, cache: Path) -> Manifest:
    """Returns a checkpoint's manifest, or raises CheckpointError saying what is damaged."""
    manifest = read_manifest(location)
    for file in manifest.files:
        try:
            path = storage.local_copy(storage.join(location, file.name), cache)
            found = File(file.name, path.stat().st_size, _digest(path))
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
        document = json.loads(storage.read_bytes(where))
        files = tuple(File(**file) for file in document.pop("files"))
        manifest = Manifest(files=files, **document)
    except StorageError as error:
        raise CheckpointError(f"{location}: no manifest, so it was never finished") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{where}: damaged: {error}") from error
    if manifest.format != FORMAT or name_of(manifest.step) != location.rsplit("/", 1)[-1]:
        raise CheckpointError(
            f"{where}: expected format {FORMAT} and the step in the folder's name, "
            f"found format {manifest.format} and step {manifest.step}"
        )
    return manifest


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


def prune(folder: str, keep: int, step: int) -> list[int]:
    """Removes all but the last `keep` checkpoints up to `step`; returns the steps removed.

    Later ones are left alone: they are damaged, and the run will come to replace them.
    """
    removed = [found for found in steps_in(folder) if found <= step][:-keep]
    for old in removed:
        storage.remove(storage.join(folder, name_of(old)))
    return removed


def remove_leftovers(folder: str) -> None:
    """Removes what a killed writer left unpublished. Only one run may write to a folder."""
    for name in storage.list_names(folder):
        if name.endswith(_PARTIAL):
            storage.remove(storage.join(folder, name))


def differences(mine: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names the keys in which two sequences differ, with both values."""
    found = []
    for key in sorted(mine.keys() | other.keys()):
        left, right = mine.get(key), other.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key}: {right!r} then, {left!r} now")
    return found


def _write_tensors(location: str, tensors: dict[str, Tensor]) -> File:
    with storage.publish(location, durable=True) as path:
        save_file(tensors, path)
        size_bytes, digest = path.stat().st_size, _digest(path)
    return File(location.rsplit("/", 1)[-1], size_bytes, digest)


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


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
