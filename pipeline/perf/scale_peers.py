"""Other people's datasets, opened by one rank: a script for an interpreter that has them.

`PYTHON scale_peers.py PEER FOLDER SAMPLES SHARDS` makes a dataset in the folder, opens it in a
process of its own, and prints JSON: the peer's version, the seconds up to the first batch, and the
memory above the imports. As of ours, all shards are one file under many names; what a peer keeps of
them, it is given in full. Nothing here imports the library,
whose pins may clash with theirs.
"""

import importlib.metadata
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

BATCH_SIZE = 64
_TEXTS = {"captions": ["A picture of some number, in colour."]}
_MAX_LINKS = 30_000  # of one file
_PACKAGES = {
    "streaming": "mosaicml-streaming",
    "litdata": "litdata",
    "energon": "megatron-energon",
}


def write_streaming(folder: Path, samples_per_shard: int, num_shards: int) -> None:
    """Writes `index.json` with every shard, each an MDS file."""
    streaming = importlib.import_module("streaming")
    with streaming.MDSWriter(out=str(folder), columns={"texts": "json"}, size_limit=None) as writer:
        for _ in range(samples_per_shard):
            writer.write({"texts": _TEXTS})
    index = json.loads((folder / "index.json").read_text())
    (shard,) = index["shards"]
    names = [f"copy.{number:06d}.mds" for number in range(num_shards)]
    _link(folder / shard["raw_data"]["basename"], names)
    index["shards"] = [
        shard | {"raw_data": shard["raw_data"] | {"basename": name}} for name in names
    ]
    (folder / "index.json").write_text(json.dumps(index))


def read_streaming(folder: Path) -> Iterator[Any]:
    """Yields samples of a rank."""
    streaming = importlib.import_module("streaming")
    yield from streaming.StreamingDataset(local=str(folder), batch_size=BATCH_SIZE, shuffle=True)


def write_litdata(folder: Path, samples_per_shard: int, num_shards: int) -> None:
    """Writes `index.json` with every chunk."""
    streaming = importlib.import_module("litdata.streaming")
    cache = streaming.Cache(str(folder), chunk_size=samples_per_shard)
    for number in range(samples_per_shard):
        cache[number] = json.dumps(_TEXTS)
    cache.done()
    cache.merge()
    index = json.loads((folder / "index.json").read_text())
    chunk = index["chunks"][0]
    names = [f"copy-0-{number}.bin" for number in range(num_shards)]
    _link(folder / chunk["filename"], names)
    index["chunks"] = [chunk | {"filename": name} for name in names]
    (folder / "index.json").write_text(json.dumps(index))


def read_litdata(folder: Path) -> Iterator[Any]:
    """Yields samples of a rank."""
    yield from importlib.import_module("litdata").StreamingDataset(str(folder), shuffle=True)


def write_energon(folder: Path, samples_per_shard: int, num_shards: int) -> None:
    """Writes tars with their indexes, and the counts and splits of all.

    Its SQLite index, which no rank reads whole, has the samples of one tar alone.
    """
    webdataset = importlib.import_module("megatron.energon.flavors.webdataset")
    payload = json.dumps(_TEXTS).encode()
    with tarfile.open(folder / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(samples_per_shard):
            member = tarfile.TarInfo(f"{number:06d}.json")
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
    webdataset.BaseWebdatasetFactory.prepare_dataset(
        folder, ["0.tar"], split_parts_ratio=[("train", 1.0)], workers=1
    )
    names = [f"copy-{number:06d}.tar" for number in range(num_shards)]
    _link(folder / "0.tar", names)
    _link(folder / "0.tar.idx", [f"{name}.idx" for name in names])
    about = folder / ".nv-meta"
    counts = {"shard_counts": dict.fromkeys(names, samples_per_shard)}
    for info in about.glob(".info.*"):
        read = json.loads if info.suffix == ".json" else yaml.safe_load
        info.write_text(json.dumps(read(info.read_text()) | counts))
    split = about / "split.yaml"
    parts = {"split_parts": {"train": names}}
    split.write_text(json.dumps(yaml.safe_load(split.read_text()) | parts))
    (about / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    )


def read_energon(folder: Path) -> Iterator[Any]:
    """Yields samples of a rank."""
    energon = importlib.import_module("megatron.energon")

    def cook(sample: Any) -> Any:
        keys = energon.basic_sample_keys(sample)
        return energon.TextSample(**keys, text=sample["json"]["captions"][0])

    encoder = energon.DefaultTaskEncoder()
    encoder.cookers = [energon.Cooker(energon.stateless(cook))]
    dataset = energon.get_train_dataset(
        folder,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=encoder,
    )
    yield from energon.get_loader(dataset)


def _link(file: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        if i and i % _MAX_LINKS == 0:
            copy = file.with_name(f"again-{i}-{file.name}")
            copy.write_bytes(file.read_bytes())
            file = copy
        os.link(file, file.with_name(name))


_WRITE = {"streaming": write_streaming, "litdata": write_litdata, "energon": write_energon}
_READ = {"streaming": read_streaming, "litdata": read_litdata, "energon": read_energon}
_IMPORTS = {"streaming": "streaming", "litdata": "litdata", "energon": "megatron.energon"}


def _status_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    (found,) = (line.split()[1] for line in status.splitlines() if line.startswith(f"{name}:"))
    return int(found) * 1024


def open_dataset(peer: str, folder: Path) -> dict[str, Any]:
    """Opens a dataset and reads a batch; returns what that took."""
    importlib.import_module(_IMPORTS[peer])
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the imports
    before, start = _status_bytes("VmRSS"), time.perf_counter()
    samples = _READ[peer](folder)
    for _ in range(BATCH_SIZE):
        next(samples)
    return {
        "version": importlib.metadata.version(_PACKAGES[peer]),
        "seconds": time.perf_counter() - start,
        "peak_bytes": _status_bytes("VmHWM") - before,
    }


def main(peer: str, folder: str, *sizes: str) -> None:
    """Makes and opens a dataset, or without sizes opens it."""
    if sizes:
        num_samples, num_shards = map(int, sizes)
        Path(folder).mkdir(parents=True)
        _WRITE[peer](Path(folder), max(num_samples // num_shards, 1), num_shards)
        command = [sys.executable, __file__, peer, folder]
        sys.exit(subprocess.run(command, check=False).returncode)
    print(json.dumps(open_dataset(peer, Path(folder))), flush=True)
    os._exit(0)  # their threads and shared memory are theirs to clean up


if __name__ == "__main__":
    main(*sys.argv[1:])
