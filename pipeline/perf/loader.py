"""`sightline bench loader`: how fast batches arrive, beside what the machine can do and peers."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from multiprocessing import active_children
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil  # type: ignore[import-untyped]
import simplejpeg
import torch
from pydantic import Field, PositiveInt

from pipeline import storage
from pipeline.config import Config
from pipeline.data.load.loader import Loader
from pipeline.data.load.order import Order
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import FeatureRow, SampleRow, from_table
from pipeline.data.media.augmentation import View
from pipeline.data.media.decoding import Picture
from pipeline.data.read.buffers import BufferPool
from pipeline.data.read.dataset import Split
from pipeline.data.read.images import ImageConfig, LiveConfig, render
from pipeline.data.tars.shard import shard_location, sidecar_location
from pipeline.errors import PipelineError
from pipeline.perf import loader_data, loader_peers, measure
from pipeline.perf.loader_data import EXTRACTOR, SPLIT
from pipeline.perf.loader_peers import Epoch
from pipeline.perf.result import Comparison, Result

OURS = "ours"
LIMIT, LIMIT_AHEAD, READS = "limit", "limit, look-ahead memory", "ours, features alone"
BARE, SAME_CALLS = "bare decoder", "bare decoder, reduced and scaled"
WORKERS = 2  # of the peers' DataLoaders
# Batches that a loader with the default look-ahead holds at once: 4 being read, one arrived, and
# one that its consumer has not let go of.
BATCHES_HELD = 6
AIMS = {  # what ours is to reach, of the reference or times a peer
    LIMIT: 0.9,
    BARE: 0.95,
    ("features", "webdataset"): 8.0,
    ("features", "litdata"): 5.0,
    ("images", "webdataset"): 2.5,
}


class LoaderBenchConfig(Config):
    """What is measured and how often."""

    samples: PositiveInt = 4096  # with features; a sample takes 147 KB at dim 2048, twice
    images: PositiveInt = 1024
    dim: PositiveInt = 2048  # values of a region
    image_size: PositiveInt = 224
    photographs: str | None = None  # a folder of JPEGs; None: drawn ones, of COCO's size
    batch_size: PositiveInt = 64
    threads: PositiveInt = 2  # of our loader, and of the bare decoder
    rounds: int = Field(default=5, ge=1)
    folder: str | None = None  # where the data is made, and removed; None: a temporary one


class _Metered:
    """A contestant that also notes the processor time of each of its runs."""

    def __init__(self, epoch: Callable[[], object]) -> None:
        self._epoch = epoch
        self._seconds: list[float] = []

    def __call__(self) -> None:
        before = _processor_seconds()
        self._epoch()
        self._seconds.append(_processor_seconds() - before)

    @property
    def seconds(self) -> float:
        """The median of all runs but the first, which is not counted in paired rounds."""
        return statistics.median(self._seconds[1:])


def run(config: LoaderBenchConfig, show: Callable[[Comparison], None]) -> Result:
    """Measures from page cache: all that is read was just written.

    `show` is given each comparison when it is made. Raises PipelineError if a contestant gives
    other samples than the rest.
    """
    machine = measure.machine(torch.device("cpu"))
    comparisons = []
    for compare in (_features, _images):
        with tempfile.TemporaryDirectory(prefix="sightline-bench-", dir=config.folder) as folder:
            comparison = compare(config, folder)
        show(comparison)
        comparisons.append(comparison)
    return Result("loader", config.model_dump(mode="json"), machine, comparisons)


def _features(config: LoaderBenchConfig, folder: str) -> Comparison:
    dataset = storage.join(folder, "dataset")
    split = loader_data.feature_split(dataset, config.samples, config.dim)
    order = Order(split, "captions", seed=1)
    loader = Loader(
        split, order, global_batch_size=config.batch_size, seed=1, threads=config.threads
    )
    epochs: dict[str, Epoch] = {OURS: _epochs(loader, config, config.samples)}
    versions, absent = _peers("webdataset", "litdata")
    if "webdataset" in versions:
        tars = loader_data.shard_paths(split, dataset, f"features/{EXTRACTOR}")
        epochs["webdataset"] = loader_peers.webdataset_features(tars, config.batch_size, WORKERS)
    if "litdata" in versions:
        copy = storage.join(folder, "litdata")
        epochs["litdata"] = loader_peers.litdata_features(split, copy, config.batch_size, WORKERS)
    _check_same(epochs, config.samples, lambda batch: batch[:, 0, 0])
    rows = order.between(0, config.samples).rows
    contestants: dict[str, Callable[[], object]] = {
        LIMIT: _same_reads(dataset, split, rows, config.batch_size, 1),
        LIMIT_AHEAD: _same_reads(dataset, split, rows, config.batch_size, BATCHES_HELD),
        READS: partial(_read_features, split, rows, config.batch_size),
        **{name: partial(_exhaust, epoch) for name, epoch in epochs.items()},
    }
    size_bytes = loader_data.GRID[0] * loader_data.GRID[1] * config.dim * 2
    return _compare(
        f"features, {loader_data.GRID[0] * loader_data.GRID[1]}x{config.dim} fp16 from page cache, "
        "random order",
        "features",
        contestants,
        config,
        config.samples,
        size_bytes,
        versions,
        [
            "limit: the same bytes of features and texts in the same order, read by one thread "
            f"into one batch's memory; below it into {BATCHES_HELD} batches' in turn, as a loader "
            "that reads ahead needs, and our reading of features without texts and threads",
            f"peers: {WORKERS} DataLoader workers, features alone; webdataset reads the sidecars "
            "as they are",
            *absent,
        ],
    )


def _images(config: LoaderBenchConfig, folder: str) -> Comparison:
    payloads = loader_data.photographs(config.images, config.photographs)
    size = config.image_size
    # As a run's whose backbone is a network of pictures, which gives a cell for 32 pixels.
    per_side = -(-size // 32)
    live = LiveConfig(images=ImageConfig(size=size), grid=(per_side, per_side), patches=False)
    split = loader_data.image_split(folder, payloads, config.images, live)
    loader = Loader(
        split,
        Order(split, "captions", seed=1),
        global_batch_size=config.batch_size,
        seed=1,
        threads=config.threads,
    )
    epochs: dict[str, Epoch] = {OURS: _epochs(loader, config, config.images)}
    versions, absent = _peers("webdataset")
    if "webdataset" in versions:
        tars = loader_data.shard_paths(split, folder, f"shards/{SPLIT}")
        epochs["webdataset"] = loader_peers.webdataset_images(
            tars, config.batch_size, WORKERS, size
        )
    _check_same(epochs, config.images, _means, tolerance=4)
    images = [split.image(row) for row in range(split.num_samples)]
    contestants: dict[str, Callable[[], object]] = {
        BARE: partial(_decode_all, images, config.threads, _decode),
        SAME_CALLS: partial(_decode_all, images, config.threads, partial(_decode_to, size)),
        **{name: partial(_exhaust, epoch) for name, epoch in epochs.items()},
    }
    mean_bytes = sum(map(len, images)) // len(images)
    return _compare(
        f"images, JPEG decoded and scaled to {size}x{size}",
        "images",
        contestants,
        config,
        config.images,
        mean_bytes,
        versions,
        [
            f"bare decoder: simplejpeg {loader_peers.installed('simplejpeg')}, "
            f"{config.threads} threads, whole pictures of {mean_bytes / 1000:.0f} KB from memory, "
            "not scaled; below it the calls that ours makes, without a loader",
            f"webdataset: {WORKERS} DataLoader workers, Pillow {loader_peers.installed('pillow')}",
            *absent,
        ],
    )


def _compare(
    title: str,
    part: str,
    contestants: Mapping[str, Callable[[], object]],
    config: LoaderBenchConfig,
    num_samples: int,
    size_bytes: int,
    versions: Mapping[str, str],
    notes: Sequence[str],
) -> Comparison:
    metered = {name: _Metered(epoch) for name, epoch in contestants.items()}
    times = measure.measure(metered, config.rounds, torch.device("cpu"))
    cpu = {name: contestant.seconds for name, contestant in metered.items()}
    figures, told = {}, []
    for reference in (LIMIT, LIMIT_AHEAD, BARE, SAME_CALLS):
        if reference in contestants:
            figures[f"of {reference}"] = times.ratio(reference, OURS)
            figures[f"of {reference}, cpu"] = cpu[reference] / cpu[OURS]
            aim = f" (aim {AIMS[reference]:g})" if reference in AIMS else ""
            told.append(
                f"ours: {figures[f'of {reference}']:.2f} of the {reference} by wall clock, "
                f"{figures[f'of {reference}, cpu']:.2f} by processor time{aim}"
            )
    for peer, number in versions.items():
        figures[f"by {peer}"] = times.ratio(peer, OURS)
        figures[f"by {peer}, cpu"] = cpu[peer] / cpu[OURS]
        told.append(
            f"ours: {figures[f'by {peer}']:.1f} times {peer} {number} by wall clock, "
            f"{figures[f'by {peer}, cpu']:.1f} by processor time (aim {AIMS[part, peer]:g})"
        )
    columns = {
        "samples/s": {name: f"{num_samples / times.median(name):,.0f}" for name in contestants},
        "MB/s": {
            name: f"{num_samples * size_bytes / times.median(name) / 1e6:,.0f}"
            for name in contestants
        },
        "CPU µs/sample": {name: f"{1e6 * cpu[name] / num_samples:,.1f}" for name in contestants},
    }
    return Comparison.of(title, times, columns=columns, notes=[*told, *notes], figures=figures)


def _epochs(loader: Loader, config: LoaderBenchConfig, num_samples: int) -> Epoch:
    """Returns what gives the loader's next epoch each time; a last smaller batch is left out."""
    steps = num_samples // config.batch_size
    starts = count(0, steps)

    def epoch() -> Iterator[npt.NDArray[Any]]:
        start = next(starts)
        for (batch,) in loader.batches(start, start + steps, 0, 1, config.batch_size):
            assert batch.features is not None
            pixels = batch.features.pixels
            yield batch.features.values if pixels is None else pixels

    return epoch


def _exhaust(epoch: Epoch) -> None:
    for _ in epoch():
        pass


def _read_features(split: Split, rows: npt.NDArray[np.int64], batch_size: int) -> None:
    for start in range(0, len(rows), batch_size):
        split.features(rows[start : start + batch_size])


def _same_reads(
    dataset: str, split: Split, rows: npt.NDArray[np.int64], batch_size: int, num_batches: int
) -> Callable[[], None]:
    """Returns what makes the reads of an epoch into the memory of batches, and nothing else."""
    manifest = Manifest.open(dataset)
    features = {
        row.key: (sidecar_location(dataset, EXTRACTOR, row.shard), part.offset, part.size)
        for row in from_table(manifest.features(EXTRACTOR).rows(), FeatureRow)
        for part in row.parts
    }
    texts = {
        row.key: (shard_location(dataset, SPLIT, row.texts_shard), row.texts_offset, row.texts_size)
        for row in from_table(manifest.samples(), SampleRow)
    }
    keys = split.keys(rows)
    pool = BufferPool()  # as ours: memory that begins with a page is read into faster
    buffers = [
        pool.empty((num_batches * batch_size, max(size for _, _, size in part.values())), np.uint8)
        for part in (features, texts)
    ]

    def reads() -> None:
        descriptors = {
            location: os.open(storage.local_path(location), os.O_RDONLY)
            for part in (features, texts)
            for location in {location for location, _, _ in part.values()}
        }
        for part, buffer in zip((features, texts), buffers, strict=True):
            lines = [[line.data] for line in buffer]
            for i, key in enumerate(keys):
                location, offset, _ = part[key]
                os.preadv(descriptors[location], lines[i % len(lines)], offset)
        for descriptor in descriptors.values():
            os.close(descriptor)

    return reads


def _decode_all(
    images: Sequence[bytes], threads: int, decode: Callable[[Sequence[bytes]], None]
) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(decode, [images[start::threads] for start in range(threads)]))


def _decode(images: Sequence[bytes]) -> None:
    for image in images:
        simplejpeg.decode_jpeg(image)


def _decode_to(size: int, images: Sequence[bytes]) -> None:
    output = np.empty((size, size, 3), np.uint8)
    for image in images:
        picture = Picture(image)
        render(picture, View.whole(picture.width, picture.height), output)


def _means(pictures: npt.NDArray[Any]) -> npt.NDArray[Any]:
    means: npt.NDArray[Any] = pictures.reshape(len(pictures), -1).mean(1)
    return means


def _check_same(
    epochs: Mapping[str, Epoch],
    num_samples: int,
    sign: Callable[[npt.NDArray[Any]], npt.NDArray[Any]],
    tolerance: float = 0.0,
) -> None:
    """Compares a number of each sample, sorted; ours may lack those of a last smaller batch."""
    signs = {
        name: np.sort(np.concatenate([sign(batch).astype(np.float64) for batch in epoch()]))
        for name, epoch in epochs.items()
    }
    for name, found in signs.items():
        is_whole = len(found) == num_samples or name == OURS
        if not is_whole or (
            len(found) == len(signs[OURS])
            and not np.allclose(found, signs[OURS], rtol=0, atol=tolerance)
        ):
            raise PipelineError(f"{name} gives other samples than the rest; the bench is void")


def _peers(*names: str) -> tuple[dict[str, str], list[str]]:
    """Returns the versions of those that are installed, and a note on each other."""
    versions = {name: found for name in names if (found := loader_peers.installed(name))}
    absent = [
        f"{name} is absent: pip install {name}, or sightline[bench]"
        for name in names
        if name not in versions
    ]
    return versions, absent


def _processor_seconds() -> float:
    """Returns what this process and its workers have used since they began."""
    workers = (psutil.Process(child.pid).cpu_times() for child in active_children())
    of_workers: float = sum(times.user + times.system for times in workers)
    return time.process_time() + of_workers
