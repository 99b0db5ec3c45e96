"""`sightline bench ingest`: images into shards, beside tar and other people's tools."""

import itertools
import json
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveInt

from pipeline.config import Config
from pipeline.data.ingest.ingest import IngestConfig, ingest
from pipeline.data.media.image_check import Verify
from pipeline.data.media.reencode import ReencodeConfig
from pipeline.data.sources.coco_captions import CocoCaptionsSourceConfig
from pipeline.errors import PipelineError
from pipeline.perf import ingest_peers, measure, photographs
from pipeline.perf.ingest_peers import Img2Dataset
from pipeline.perf.rerun import measure_rerun
from pipeline.perf.result import Comparison, Result

OURS, DECODING, BARE = "ours", "ours, every image decoded", "ours, its shards alone"
_OURS = (OURS, DECODING, BARE)
TAR, SHARD_WRITER, IMG2DATASET = "tar", "webdataset ShardWriter", "img2dataset"
_SHORTER_SIDE, _QUALITY = 256, 95
_CHECK_AIM = 2.5  # of the default check, which reads every code of an image: times the rest
_CPU = torch.device("cpu")


class IngestBenchConfig(Config):
    """What is measured and how often."""

    images: PositiveInt = 2000  # drawn
    quality: int = Field(default=88, ge=1, le=100)  # of their JPEGs: 88 makes 60 KB, 97 150 KB
    records: PositiveInt = 20_000  # of the listing of an unchanged run
    rounds: PositiveInt = 3
    img2dataset: str | None = None  # its command; None: the one on the PATH
    folder: str | None = None  # where all is made, and removed; None: a temporary one


def run(config: IngestBenchConfig, show: Callable[[Comparison], None]) -> Result:
    """Measures processor time, from page cache: all that is read was just written.

    `show` is given each comparison when it is made. Raises PipelineError if a contestant did not
    write everything.
    """
    machine = measure.machine(_CPU)
    comparisons = []
    with tempfile.TemporaryDirectory(prefix="sightline-bench-", dir=config.folder) as folder:
        work = _Work(Path(folder), config)
        for compare in (work.as_they_came, work.smaller, work.unchanged):
            comparison = compare()
            show(comparison)
            comparisons.append(comparison)
    return Result("ingest", config.model_dump(mode="json"), machine, comparisons)


class _Work:
    """The image files, and folders for what is made of them."""

    def __init__(self, folder: Path, config: IngestBenchConfig) -> None:
        self._folder = folder
        self._config = config
        self._images = folder / "images"
        photographs.draw(self._images, config.images, config.quality)
        document = json.loads((self._images / "captions.json").read_text())
        files = [image["file_name"] for image in document["images"]]
        words = [annotation["caption"] for annotation in document["annotations"]]
        self._captions = dict(zip(files, words, strict=True))
        self._outputs = itertools.count()
        self._img2dataset = Img2Dataset.find(config.img2dataset)

    def as_they_came(self) -> Comparison:
        """Image files stored byte for byte, digests included."""
        contestants: dict[str, Callable[[Path], object]] = {}
        versions, absent = {}, []
        if (found := ingest_peers.tar_version()) is not None:
            contestants[TAR] = lambda output: ingest_peers.tar(self._images, output)
            versions[TAR] = found
        else:
            absent.append("GNU tar")
        contestants[OURS] = lambda output: self._ingest(output, "header", None)
        contestants[DECODING] = lambda output: self._ingest(output, "decode", None)
        contestants[BARE] = lambda output: ingest_peers.bare_shards(
            self._images, self._captions, output
        )
        if (found := ingest_peers.webdataset_version()) is not None:
            contestants[SHARD_WRITER] = lambda output: ingest_peers.shard_writer(
                self._images, self._captions, output
            )
            versions[SHARD_WRITER] = f"webdataset {found}"
        else:
            absent.append("webdataset (pip install webdataset)")
        self._add_img2dataset(contestants, versions, absent, None)
        return self._compare("ingest, image files as they came", contestants, versions, absent)

    def smaller(self) -> Comparison:
        """Images scaled to a shorter side of 256 pixels and encoded anew."""
        reencode = ReencodeConfig(shorter_side=_SHORTER_SIDE, quality=_QUALITY)
        contestants: dict[str, Callable[[Path], object]] = {}
        versions: dict[str, str] = {}
        absent: list[str] = []
        self._add_img2dataset(contestants, versions, absent, _SHORTER_SIDE)
        contestants[OURS] = lambda output: self._ingest(output, "decode", reencode)
        title = f"ingest, shorter side {_SHORTER_SIDE}, JPEG of quality {_QUALITY}"
        return self._compare(title, contestants, versions, absent)

    def unchanged(self) -> Comparison:
        """A run over a listing that the manifest has already."""
        took = measure_rerun(self._config.records, self._folder)
        peak = took.peak_bytes / 2**20
        listing, ours = "going through the listing", "unchanged run"
        return Comparison(
            f"unchanged run over {self._config.records:,} records",
            {listing: took.listing_seconds, ours: took.seconds},
            {listing: 1.0, ours: took.listing_seconds / took.seconds},
            notes=[
                f"{took.processor_seconds:.2f} s of processor time; at most {peak:,.0f} MiB, of "
                "the whole process"
            ],
            figures={
                "processor_seconds": took.processor_seconds,
                "peak_bytes": took.peak_bytes,
            },
        )

    def _add_img2dataset(
        self,
        contestants: dict[str, Callable[[Path], object]],
        versions: dict[str, str],
        absent: list[str],
        shorter_side: int | None,
    ) -> None:
        peer = self._img2dataset
        if peer is None:
            absent.append(
                "img2dataset (in an environment of its own: pipx install img2dataset, or name "
                "its command)"
            )
            return
        contestants[IMG2DATASET] = lambda output: peer.run(
            self._images, self._captions, output, shorter_side
        )
        versions[IMG2DATASET] = f"img2dataset {peer.version}"

    def _ingest(self, output: Path, verify: Verify, reencode: ReencodeConfig | None) -> None:
        source = CocoCaptionsSourceConfig(
            type="coco-captions",
            images=str(self._images),
            annotations={"train": str(self._images / "captions.json")},
        )
        config = IngestConfig(
            samples_per_shard=ingest_peers.SAMPLES_PER_SHARD,
            verify=verify,
            reencode=reencode,
            shards_in_flight=0,
        )
        report = ingest(source.build(), str(output), config)
        if report.num_live != self._config.images:
            raise PipelineError(f"{report.num_live} of {self._config.images} images were stored")

    def _compare(
        self,
        title: str,
        contestants: Mapping[str, Callable[[Path], object]],
        versions: Mapping[str, str],
        absent: list[str],
    ) -> Comparison:
        metered = {name: _Metered(work, self._new_output) for name, work in contestants.items()}
        times = measure.measure(metered, self._config.rounds, _CPU, clock=processor_seconds)
        about = ["ms are of processor time, children included", ", ".join(versions.values())]
        notes = ["; ".join(filter(None, about))]
        start_up: dict[str, float] = {}
        if IMG2DATASET in contestants:
            start_up[IMG2DATASET] = self._start_up_of_img2dataset()
            times = _without(times, start_up)
            notes.append(f"without img2dataset's start, {start_up[IMG2DATASET]:.1f} s each time")
        if absent:
            notes.append(f"not here to compare with: {'; '.join(absent)}")
        size = sum(path.stat().st_size for path in ingest_peers.image_files(self._images))
        num_images = self._config.images
        columns: dict[str, dict[str, str]] = {
            "images/s": {n: f"{num_images / times.median(n):,.0f}" for n in contestants},
            "MB/s": {n: f"{size / times.median(n) / 1e6:,.0f}" for n in contestants},
            "wall ms": {n: f"{1000 * each.median_seconds:,.1f}" for n, each in metered.items()},
        }
        ratios = {
            f"times as fast as {name}": times.ratio(name, OURS)
            for name in contestants
            if name not in _OURS
        }
        notes += [f"ours is {ratio:.2f} {name}" for name, ratio in ratios.items()]
        if DECODING in contestants:
            checking = times.median(DECODING) / times.median(OURS) - 1
            ratios["the check of whole files, of the rest"] = checking
            notes.append(
                f"the check of whole files costs {checking:.1f} times the rest (aim {_CHECK_AIM})"
            )
        if BARE in contestants:
            bare = times.median(BARE) / times.median(OURS)
            notes.append(
                f"of ours, {bare:.0%} is reading, digesting and writing; the rest is listing the "
                "source, comparing it with the manifest, and the rows of that"
            )
        return Comparison.of(title, times, columns=columns, notes=notes, figures=ratios)

    def _start_up_of_img2dataset(self) -> float:
        """Returns the processor time of a run over one image."""
        assert self._img2dataset is not None
        one = self._folder / "one"
        one.mkdir(exist_ok=True)
        first = ingest_peers.image_files(self._images)[0]
        shutil.copy(first, one)
        taken = []
        for _ in range(self._config.rounds):
            output = self._new_output()
            start = processor_seconds()
            self._img2dataset.run(one, self._captions, output, None)
            taken.append(processor_seconds() - start)
        return statistics.median(taken)

    def _new_output(self) -> Path:
        """Returns a path for a contestant to write to; what was written before is removed."""
        outputs = self._folder / "outputs"
        shutil.rmtree(outputs, ignore_errors=True)
        outputs.mkdir()
        return outputs / str(next(self._outputs))


class _Metered:
    """A contestant with a fresh place to write to, that also notes the time by the wall clock."""

    def __init__(self, work: Callable[[Path], object], new_output: Callable[[], Path]) -> None:
        self._work = work
        self._new_output = new_output
        self._seconds: list[float] = []

    def __call__(self) -> None:
        output = self._new_output()
        start = time.perf_counter()
        self._work(output)
        self._seconds.append(time.perf_counter() - start)

    @property
    def median_seconds(self) -> float:
        """Of all runs but the first, which is not counted in paired rounds."""
        return statistics.median(self._seconds[1:])


def processor_seconds() -> float:
    """Returns the processor time of this process and of the children that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _without(times: measure.Times, start_up: Mapping[str, float]) -> measure.Times:
    rounds: dict[str, Any] = dict(times.rounds)
    for name, seconds in start_up.items():
        rounds[name] = tuple(max(each - seconds, 1e-9) for each in rounds[name])
    return measure.Times(rounds)
