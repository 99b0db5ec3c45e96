"""`sightline bench extract`: how fast JPEG shards become features, and what bounds it.

From shards to sidecars, against the network alone on tensors that are there already; and on Ray,
against a Ray Data pipeline of `map` and `map_batches` on as many cores.
"""

import contextlib
import io
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
import xxhash
from PIL import Image
from pydantic import Field, PositiveInt

from pipeline import storage
from pipeline.cluster import ClusterConfig, start_ray
from pipeline.config import Config
from pipeline.data.ingest.ingest import IngestConfig, ingest
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.read.extractor_card import StorageLoss
from pipeline.data.sample import Texts, safe_key
from pipeline.data.sources.base import Record, fingerprint
from pipeline.data.tars.shard_files import ShardFiles, default_cache
from pipeline.errors import ConfigError
from pipeline.perf import measure, photographs
from pipeline.perf.result import Comparison, Result
from pipeline.vision.compress.pca import fit
from pipeline.vision.compress.storage_dtype import compare_storage
from pipeline.vision.extract import ExtractConfig, extract, plan_sidecars
from pipeline.vision.extractor import Extractor, measure_invariance
from pipeline.vision.extractors.arithmetic import exact_arithmetic
from pipeline.vision.extractors.detection.regions import RegionsConfig
from pipeline.vision.extractors.grid import GridConfig
from pipeline.vision.preprocess.image import IMAGENET_MEAN, IMAGENET_STD, Prepared
from pipeline.vision.sidecar import shard_images, write_sidecar

BARE, OURS = "the network alone, tensors ready", "JPEG shards to sidecars"
PREPARED, DECODED = "pixels to stored features", "JPEG to pixels"
RAY_DATA, RAY_DATA_ALL = "Ray Data map_batches", "Ray Data map_batches, all threads"
OURS_ON_RAY = "sightline extract"
NUM_SHARDS = 4
LOOK_SECONDS = 0.2
JPEG_QUALITY = 97  # of drawn photographs: the bytes that those of COCO have
MEASURED_IMAGES = 8  # of which batch invariance and errors of storage are taken
SHARE_TARGET, RAY_DATA_TARGET = 0.9, 1.2


class ExtractBenchConfig(Config):
    """What is extracted from how many images, and how often."""

    network: str = "resnet50"  # torchvision's; fasterrcnn_… is measured as `regions`
    node: str = "layer4"  # of a grid
    weights: str = "random"
    storage: Literal["float16", "int8", "int8-per-channel"] = "float16"
    pca_dims: PositiveInt | None = 256  # of which sizes and errors are shown too
    images: int = Field(default=64, ge=2 * NUM_SHARDS)
    batch_size: PositiveInt = 16
    threads: PositiveInt | None = None  # None: as many as torch takes
    rounds: PositiveInt = 3
    photographs: str | None = None  # a folder of JPEGs, taken in turn; None: drawn, 640 x 480
    ray: bool = True  # also whole runs, beside Ray Data

    def extractor(self) -> GridConfig | RegionsConfig:
        """Returns the settings of the extractor that is measured."""
        how = {"network": self.network, "weights": self.weights, "storage": self.storage}
        if self.network.startswith("fasterrcnn"):
            return RegionsConfig.model_validate(how)
        return GridConfig.model_validate(how | {"node": self.node})


class Network(Extractor, Protocol):
    """An extractor whose network can be run alone."""

    def load(self, prepared: Sequence[Prepared]) -> Any:
        """Returns what the network takes, on its device."""
        ...

    def forward(self, loaded: Any) -> Any:
        """Runs the network alone."""
        ...


@dataclass(frozen=True)
class JpegSource:
    """Photographs by key, all of one split."""

    images: Mapping[str, bytes]

    def records(self) -> Iterator[Record]:
        for key, image in self.images.items():
            texts = Texts(key, ("a photograph",)).encoded()
            stamp = fingerprint(xxhash.xxh3_64_hexdigest(image))
            yield Record(key, "train", key, "jpg", texts, stamp)

    def read(self, record: Record) -> bytes:
        return self.images[record.image]


def run(config: ExtractBenchConfig, show: Callable[[Comparison], None]) -> Result:
    """Measures on the GPU if there is one, else on the CPU; `show` is given each comparison."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads_before = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads_before)
    try:
        machine = measure.machine(device)
        with tempfile.TemporaryDirectory(prefix="sl-bench-") as folder:
            url = _make_shards(config, Path(folder), "dataset", config.images)
            comparisons = []
            for comparison in _comparisons(config, url, device, Path(folder)):
                show(comparison)
                comparisons.append(comparison)
    finally:
        torch.set_num_threads(threads_before)
    return Result("extract", config.model_dump(mode="json"), machine, comparisons)


def _comparisons(
    config: ExtractBenchConfig, url: str, device: torch.device, folder: Path
) -> Iterator[Comparison]:
    yield loaded_network(config, url, device)
    if config.ray and isinstance(config.extractor(), GridConfig):
        yield whole_runs(config, url, device, folder)


def loaded_network(config: ExtractBenchConfig, url: str, device: torch.device) -> Comparison:
    """Times shards to sidecars beside the bare forward, and the parts of it alone."""
    extractor: Network = config.extractor().load(str(device))
    threads = torch.get_num_threads()
    files = ShardFiles(default_cache())
    plans, _ = plan_sidecars(Manifest.open(url), extractor.name)
    images = [image for plan in plans for _, image in shard_images(plan, files)]
    batches = _batches([extractor.prepare(image) for image in images], config.batch_size)
    loaded = [extractor.load(batch) for batch in batches]

    def forward() -> None:
        with exact_arithmetic():
            for tensors in loaded:
                extractor.forward(tensors)

    def compute() -> None:
        for batch in batches:
            extractor.extract(batch)

    def decode() -> None:
        for image in images:
            extractor.prepare(image)

    def shards_to_sidecars() -> None:
        for plan in plans:
            write_sidecar(extractor, plan, files, config.batch_size, threads)

    contestants = {
        BARE: forward,
        OURS: shards_to_sidecars,
        PREPARED: compute,
        DECODED: decode,
    }
    with CpuMeter() as meter:
        times = measure.measure(meter.metered(contestants), config.rounds, device)
    cpu = {name: meter.median(name) for name in contestants}
    share, cpu_share = times.ratio(BARE, OURS), cpu[BARE] / cpu[OURS]
    invariance = measure_invariance(extractor.exact(), batches[0][:MEASURED_IMAGES])
    stored = _storage_forms(extractor.exact(), batches, config.pca_dims)
    count = len(images)
    notes = [
        f"{share:.2f} of the bare forward by the clock, {cpu_share:.2f} by CPU time "
        f"(target {SHARE_TARGET}); decoding takes {1000 * cpu[DECODED] / count:.1f} ms of CPU an "
        f"image, the network {1000 * cpu[BARE] / count:.1f}, packing and moving "
        f"{1000 * max(0.0, cpu[PREPARED] - cpu[BARE]) / count:.1f}",
        f"batch invariance: a feature moves by at most {invariance.largest_difference:.1e} of "
        f"its size with its batch ({invariance.images} images; {invariance.tolerance:g} is "
        "refused)",
        *(
            f"stored as {form}: {error.bytes_per_image:,} bytes an image, relative RMS error "
            f"{error.relative_rms:.5f}, cosine {error.cosine:.6f}"
            for form, error in stored.items()
        ),
    ]
    return Comparison.of(
        f"{config.network}, {count} images in batches of {config.batch_size}, network loaded",
        times,
        columns=_columns(times, cpu, count),
        notes=notes,
        figures={
            "share_of_forward": share,
            "share_of_forward_cpu": cpu_share,
            "batch_invariance": invariance.largest_difference,
            "decode_cpu_seconds": cpu[DECODED] / count,
            "forward_cpu_seconds": cpu[BARE] / count,
            **{
                f"{form}: {name}": getattr(error, name)
                for form, error in stored.items()
                for name in ("bytes_per_image", "relative_rms", "cosine")
            },
        },
    )


def whole_runs(
    config: ExtractBenchConfig, url: str, device: torch.device, folder: Path
) -> Comparison:
    """Times extract on Ray actors beside Ray Data: what further images cost, actors being up.

    That is the time for all images less the time for a few in as many shards, so that starting
    actors and loading networks, which every run does once, are in neither.
    """
    threads, gpus = torch.get_num_threads(), int(device.type == "cuda")
    start_ray(ClusterConfig(workers=threads))
    extractor = config.extractor()
    assert isinstance(extractor, GridConfig)
    how = {"batch_size": config.batch_size, "gpus_per_actor": gpus}
    # On CPUs as many networks as cores: a thread each does more than all threads for one.
    each = {"actors": 1, "cpus_per_actor": threads} if gpus else {"actors": threads}
    pool = ExtractConfig.model_validate(how | each)
    num_few = few_images(config)
    few = _make_shards(config, folder, "few", num_few)
    fresh = (folder / f"run-{number}" for number in range(10**6))

    def ours(dataset: str) -> None:
        extract(str(shutil.copytree(dataset, next(fresh))), extractor, pool)

    def ray_data(network_threads: int, dataset: str) -> None:
        shards = sorted(str(path) for path in (Path(dataset) / "shards" / "train").glob("*.tar"))
        to = str(next(fresh))
        ray_data_extract(shards, extractor, config.batch_size, network_threads, gpus, to)

    runs: dict[str, Callable[[str], None]] = {
        RAY_DATA: partial(ray_data, 1),
        RAY_DATA_ALL: partial(ray_data, threads),
        OURS_ON_RAY: ours,
    }
    with CpuMeter() as meter:
        contestants = {
            f"{name} {size}": partial(run, dataset)
            for name, run in runs.items()
            for size, dataset in (("few", few), ("all", url))
        }
        found = measure.measure(meter.metered(contestants), config.rounds, device)
    times = further(found.rounds, runs)
    cpu = further(meter.rounds(), runs)
    faster, leaner = (min((RAY_DATA, RAY_DATA_ALL), key=of.median) for of in (times, cpu))
    ratio, cpu_ratio = times.ratio(faster, OURS_ON_RAY), cpu.ratio(leaner, OURS_ON_RAY)
    count = config.images - num_few
    columns = _columns(times, {name: cpu.median(name) for name in runs}, count)
    columns["s to start"] = {name: f"{found.median(f'{name} few'):,.1f}" for name in runs}
    return Comparison.of(
        f"{config.network}, {count} further images, on Ray with {threads} cores",
        times,
        columns=columns,
        notes=[
            f"{ratio:.2f} times as fast as the faster Ray Data pipeline by the clock, "
            f"{cpu_ratio:.2f} by CPU time (target {RAY_DATA_TARGET})",
            f"to start: a run of {num_few} images; ours also measures batch invariance and the "
            "error of storage, for its card",
        ],
        figures={"ratio_to_ray_data": ratio, "ratio_to_ray_data_cpu": cpu_ratio},
    )


def further(rounds: Mapping[str, Sequence[float]], names: Iterable[str]) -> measure.Times:
    """Returns in each round what all shards took beyond a few."""
    return measure.Times(
        {
            name: tuple(
                max(more - few, 1e-9)
                for few, more in zip(rounds[f"{name} few"], rounds[f"{name} all"], strict=True)
            )
            for name in names
        }
    )


def ray_data_extract(
    shards: Sequence[str],
    extractor: GridConfig,
    batch_size: int,
    threads: int,
    gpus: int,
    output: str,
) -> None:
    """The pipeline that Ray Data's guide to batch inference would have one write."""
    import ray

    size = extractor.image_size

    def pixels(row: dict[str, Any]) -> dict[str, Any]:
        image = Image.open(io.BytesIO(row["jpg"]), formats=["JPEG"]).convert("RGB")
        resized = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
        return {"key": row["__key__"], "pixels": resized}

    class Features:
        def __init__(self) -> None:
            from torchvision.models import get_model
            from torchvision.models.feature_extraction import create_feature_extractor

            torch.set_num_threads(threads)
            self.device = "cuda" if gpus else "cpu"
            model = get_model(extractor.network, weights=None)
            nodes = {extractor.node: "map"}
            self.network = create_feature_extractor(model, nodes).eval().to(self.device)
            self.mean, self.std = (
                torch.tensor(values, device=self.device).view(3, 1, 1)
                for values in (IMAGENET_MEAN, IMAGENET_STD)
            )

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            images = torch.from_numpy(batch["pixels"]).to(self.device).permute(0, 3, 1, 2)
            with torch.inference_mode():
                maps = self.network((images.float() / 255 - self.mean) / self.std)["map"]
            cells = maps.flatten(2).transpose(1, 2) if maps.ndim == 4 else maps.unsqueeze(1)
            return {"key": batch["key"], "features": cells.half().cpu().numpy()}

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    (
        ray.data.read_webdataset(list(shards), suffixes=["jpg"], decoder=None)
        .map(pixels)
        .map_batches(
            Features,
            batch_size=batch_size,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=1,
            num_gpus=gpus,
        )
        .write_parquet(output)
    )


class CpuMeter:
    """CPU seconds of contestants: of this process and all below it, while the block lasts.

    A process takes what it has used with it when it ends, so that all are looked at often.
    """

    def __init__(self) -> None:
        self._calls: dict[str, list[float]] = {}
        self._seconds: dict[tuple[int, float], float] = {}  # by process id and start
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watcher.join()

    def metered(
        self, contestants: Mapping[str, measure.Contestant]
    ) -> dict[str, measure.Contestant]:
        """Returns the contestants such that each call is recorded."""

        def call(name: str, contestant: measure.Contestant) -> None:
            before = self._look()
            contestant()
            self._calls.setdefault(name, []).append(self._look() - before)

        return {name: partial(call, name, run) for name, run in contestants.items()}

    def rounds(self) -> dict[str, tuple[float, ...]]:
        """Returns the seconds of each contestant's calls but the first, which is not counted."""
        return {name: tuple(calls[1:]) for name, calls in self._calls.items()}

    def median(self, name: str) -> float:
        """Returns the median of a contestant's calls but the first."""
        return measure.Times(self.rounds()).median(name)

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> float:
        here = psutil.Process()
        for process in (here, *here.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                used = sum(process.cpu_times()[:2])  # user and system
                self._seconds[process.pid, process.create_time()] = used
        return sum(self._seconds.copy().values())


def _storage_forms(
    exact: Extractor, batches: Sequence[Sequence[Prepared]], pca_dims: int | None
) -> dict[str, StorageLoss]:
    """Returns size and error of every form of storage; PCA is fitted to the other batches.

    Without PCA if they have no more vectors, or values, than dimensions are asked for.
    """
    measured, *rest = batches
    values = [feature.values for batch in rest for feature in exact.extract(batch)]
    projections = {}
    if pca_dims is not None and pca_dims < min(sum(map(len, values)), exact.card().dim):
        projections[f"PCA {pca_dims}"], _ = fit(values, pca_dims)
    return compare_storage(exact.extract(measured[:MEASURED_IMAGES]), projections)


def few_images(config: ExtractBenchConfig) -> int:
    """Returns how many images a run has that shows what starting costs: some in each shard."""
    return max(NUM_SHARDS, config.images // NUM_SHARDS)


def _make_shards(config: ExtractBenchConfig, folder: Path, name: str, count: int) -> str:
    """Returns a dataset of so many images in as many shards as all datasets here have."""
    source = JpegSource(_photographs(config.photographs, count, folder))
    url = str(folder / name)
    per_shard = -(-count // NUM_SHARDS)
    ingest(source, url, IngestConfig(samples_per_shard=per_shard, shards_in_flight=0))
    return url


def _photographs(source: str | None, count: int, folder: Path) -> dict[str, bytes]:
    """Returns JPEGs by key: those of a folder, again and again, or drawn ones."""
    if source is None:
        drawn = folder / f"drawn-{count}"
        photographs.draw(drawn, count, quality=JPEG_QUALITY)
        source = str(drawn)
    names = [name for name in sorted(storage.list_names(source)) if name.lower().endswith("jpg")]
    if not names:
        raise ConfigError(f"photographs={source}: no .jpg files in it")
    return {
        f"{number:06d}-{safe_key(name[:-4])[:60]}": storage.read_bytes(storage.join(source, name))
        for number, name in zip(range(count), cycle(names), strict=False)
    }


def _batches(prepared: Sequence[Prepared], batch_size: int) -> list[list[Prepared]]:
    return [
        list(prepared[start : start + batch_size]) for start in range(0, len(prepared), batch_size)
    ]


def _columns(
    times: measure.Times, cpu: Mapping[str, float], count: int
) -> dict[str, dict[str, str]]:
    return {
        "images/s": {name: f"{count / times.median(name):,.1f}" for name in cpu},
        "CPU ms an image": {
            name: f"{1000 * seconds / count:,.1f}" for name, seconds in cpu.items()
        },
    }
