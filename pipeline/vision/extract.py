"""Extraction: sidecars for the shards of a dataset that have none.

The work is shard by shard on a pool of Ray actors, each of which holds the network once. A sidecar
is listed in the manifest when it is whole, so that a run that is killed loses the shards in
flight and the next one does the rest. A sidecar that was never listed does not exist.

An image of which the extractor can make nothing costs that sample: it is listed with the reason,
counted, and left alone until it is another image. Splits opened with these features pass over it.
"""

import contextlib
import functools
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline import storage
from pipeline.config import Config
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.pending_commits import PendingCommits
from pipeline.data.manifest.schema import foreign_tars, matching_rows
from pipeline.data.read.extractor_card import (
    ExtractionEnvironment,
    ExtractorCard,
    card_location,
    read_card,
    write_card,
)
from pipeline.data.tars.foreign_tar import ForeignTar
from pipeline.data.tars.shard_files import ShardFiles, default_cache
from pipeline.errors import ClusterError, ConfigError, FeatureError, PipelineError, RejectError
from pipeline.resources import Waiting, require_cluster, wait
from pipeline.vision.compress.storage_dtype import measure_storage_loss
from pipeline.vision.extractor import Extractor, measure_invariance
from pipeline.vision.extractors.network import NetworkConfig, fit_if_absent
from pipeline.vision.extractors.registry import AnyExtractor, from_card
from pipeline.vision.sidecar import Sidecar, SidecarPlan, prepared_images, write_sidecar

MEASURED_IMAGES = 5
MEASURED_SHARDS = 8  # that are looked at until there are as many images
SHARD_RETRIES = 3  # for a lost actor or node; an error is not retried


class ExtractConfig(Config):
    """The pool of actors that computes features."""

    actors: int = Field(
        default=1, ge=0, description="actors that compute features; 0: in this process, without Ray"
    )
    cpus_per_actor: float = Field(
        default=1, gt=0, description="CPUs that an actor asks the cluster for"
    )
    gpus_per_actor: float = Field(
        default=0, ge=0, description="0.25: four actors share a GPU; 0: CPU only"
    )
    batch_size: int = Field(default=32, ge=1, description="images the network takes at once")
    max_reject_fraction: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="stops the run when no feature can be made of more of the live samples than "
        "this",
    )

    def device(self) -> str:
        """Where the network computes."""
        return "cuda" if self.gpus_per_actor else "cpu"

    def threads(self) -> int:
        """How many threads of an actor decode, and how many the network has on a CPU."""
        return math.ceil(self.cpus_per_actor)


@dataclass(frozen=True)
class ExtractProgress:
    """How far a run is."""

    num_done: int  # images
    num_to_do: int  # images, those done included
    images_per_second: float
    waited_fraction: float  # of the networks' time, what they spent without work


@dataclass(frozen=True)
class ExtractReport:
    """What a run did, and what it leaves."""

    extractor: str  # the folder under features/, by which a split is opened with them
    card: ExtractorCard
    num_shards: int  # computed by this run
    num_images: int  # looked at by this run, rejects included
    num_unchanged: int  # live samples that had their features, or were rejects, before
    rejects: Mapping[str, int]  # live samples without a feature, by reason
    seconds: float
    images_per_second: float
    waited_fraction: float
    size_bytes: int  # of the sidecars written by this run


def _ignore_progress(_progress: ExtractProgress) -> None: ...


def _is_running() -> None: ...


def extract(
    url: str,
    extractor_config: AnyExtractor,
    config: ExtractConfig,
    on_progress: Callable[[ExtractProgress], None] = _ignore_progress,
    start_ray: Callable[[], None] = _is_running,
) -> ExtractReport:
    """Gives every live sample of the newest version its features; see the module.

    `start_ray` is called before the first actor, if there is any work and `config.actors` is not 0.
    Raises RejectError if no feature can be made of too many live samples, and FeatureError if
    weights are missing or a feature depends on what shares its batch; what was listed stays.
    """
    url = storage.absolute(url)
    started = time.perf_counter()
    manifest = Manifest.open(url)
    in_process = config.actors == 0
    if isinstance(extractor_config, NetworkConfig):
        fit_if_absent(url, extractor_config)
    # The actors say what they compute on; here only the identity is needed.
    extractor = extractor_config.build(_usable(config.device()) if in_process else "cpu")
    plans, num_unchanged = plan_sidecars(manifest, extractor.name)
    rejects = _Rejects(manifest, extractor.name, config.max_reject_fraction)
    card = _Card(url, extractor)
    if in_process:
        work = _in_process(extractor, card.known, plans, config)
    else:
        work = _on_actors(card.known, plans, config)
        if plans:
            start_ray()
    meter = _Meter(sum(len(plan.live) for plan in plans))
    on_progress(meter.progress())
    listed = manifest.features(extractor.name)
    unlisted = PendingCommits[pa.Table](lambda rows: listed.commit(pa.concat_tables(rows)))
    try:
        for result in work:
            if isinstance(result, ExtractionEnvironment):
                card.add(result)
                continue
            meter.add(result)
            unlisted.add(result.rows)
            rejects.add(result)
            on_progress(meter.progress())
    finally:
        unlisted.flush()
    progress = meter.progress()
    return ExtractReport(
        extractor=extractor.name,
        card=card.known,
        num_shards=meter.num_shards,
        num_images=progress.num_done,
        num_unchanged=num_unchanged,
        rejects=rejects.counts,
        seconds=time.perf_counter() - started,
        images_per_second=progress.images_per_second,
        waited_fraction=progress.waited_fraction,
        size_bytes=meter.size_bytes,
    )


def plan_sidecars(manifest: Manifest, extractor: str) -> tuple[list[SidecarPlan], int]:
    """Returns the shards with live samples that lack features, and how many live samples do not."""
    samples = manifest.samples(["key", "shard", "split", "tar"])
    listed = manifest.features(extractor).rows(["key", "shard"])
    missing = samples.filter(pa.array(matching_rows(samples, listed, ["key", "shard"]) < 0))
    stale = samples.filter(pc.is_in(samples["shard"], pc.unique(missing["shard"])))
    tars, tar_of_row = foreign_tars(stale["tar"])
    live: dict[tuple[str, str], set[str]] = {}
    tar_of: dict[str, ForeignTar] = {}  # of the shards that refer to images
    names = (stale[name].to_pylist() for name in ("key", "shard", "split"))
    for key, shard, split, number in zip(*names, tar_of_row.tolist(), strict=True):
        live.setdefault((split, shard), set()).add(key)
        if number >= 0:
            tar_of[shard] = tars[number]
    plans = [
        SidecarPlan(manifest.url, split, shard, frozenset(keys), tar_of.get(shard))
        for (split, shard), keys in sorted(live.items())
    ]
    return plans, samples.num_rows - missing.num_rows


class _Card:
    """`card.json`, written before any feature is listed.

    A run with other library versions, or on another device, adds its environment with the batch
    invariance and the error of storage that it measured there.
    """

    def __init__(self, url: str, extractor: Extractor) -> None:
        self._url = url
        found = read_card(url, extractor.name)
        self.known = found or extractor.card().model_copy(update={"environments": ()})
        now = extractor.card().identity
        if self.known.identity != now:
            raise FeatureError(
                f"{card_location(url, extractor.name)}: is of identity {self.known.identity}, not "
                f"{now}, although both are named alike; move it away"
            )

    def add(self, environment: ExtractionEnvironment) -> None:
        known = self.known.environments
        if environment not in known:
            self.known = self.known.model_copy(update={"environments": (*known, environment)})
            write_card(self._url, self.known)


def _environment(
    extractor: Extractor, card: ExtractorCard, plans: Sequence[SidecarPlan], files: ShardFiles
) -> ExtractionEnvironment:
    """Returns the environment of this process, as the card has it or measured now."""
    (here,) = extractor.card().environments
    for known in card.environments:
        if known.is_at(here):
            return known
    prepared = prepared_images(extractor, plans, files, MEASURED_IMAGES)
    if not prepared:  # nothing to measure on: what there is to do will be listed as rejects
        return here
    exact = extractor.exact()
    measured = {
        "batch_invariance": measure_invariance(exact, prepared),
        "storage_error": measure_storage_loss(exact.extract(prepared), extractor.extract(prepared)),
    }
    return here.model_copy(update=measured)


def _in_process(
    extractor: Extractor, card: ExtractorCard, plans: Sequence[SidecarPlan], config: ExtractConfig
) -> Iterator[ExtractionEnvironment | Sidecar]:
    files = ShardFiles(default_cache())
    with _torch_threads(config.threads()):
        if plans:
            yield _environment(extractor, card, plans[:MEASURED_SHARDS], files)
        for plan in plans:
            yield write_sidecar(extractor, plan, files, config.batch_size, config.threads())


def _on_actors(
    card: ExtractorCard, plans: Sequence[SidecarPlan], config: ExtractConfig
) -> Iterator[ExtractionEnvironment | Sidecar]:
    """Yields environments as actors start, and sidecars as they finish, one at a time on each.

    Actors that the cluster has no room for yet are given work when they come up.
    """
    if not plans:
        return
    import ray

    asked = {"CPU": config.cpus_per_actor, "GPU": config.gpus_per_actor}
    waiting = Waiting("extract", 1, asked)
    worker = ray.remote(
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor,
        max_restarts=-1,
        max_task_retries=SHARD_RETRIES,
    )(_Worker)
    actors = [worker.remote(card, config) for _ in range(min(config.actors, len(plans)))]
    running = {
        actor.environment.remote(plans[:MEASURED_SHARDS]): (actor, plans[0]) for actor in actors
    }
    to_do = deque(plans)
    num_left, has_begun = len(plans), False
    try:
        waiting.require_room()
        while num_left:
            done = wait(list(running), waiting, has_begun)
            has_begun = True
            actor, plan = running.pop(done[0])
            result = _result(done[0], plan)
            if to_do:
                plan = to_do.popleft()
                running[actor.write.remote(plan)] = (actor, plan)
            num_left -= isinstance(result, Sidecar)
            yield result
    finally:
        for actor in actors:
            ray.kill(actor)


class _Worker:
    """The actor: an extractor, and the shards it is asked for one after the other."""

    def __init__(self, card: ExtractorCard, config: ExtractConfig) -> None:
        self._card = card
        self._config = config
        self._files = ShardFiles(default_cache())

    @functools.cached_property
    def _extractor(self) -> Extractor:  # not in __init__, whose errors Ray wraps up in a lost actor
        return from_card(self._card, _usable(self._config.device()))

    def environment(self, plans: Sequence[SidecarPlan]) -> ExtractionEnvironment:
        extractor = self._extractor
        with _torch_threads(self._config.threads()):
            return _environment(extractor, self._card, plans, self._files)

    def write(self, plan: SidecarPlan) -> Sidecar:
        extractor, threads = self._extractor, self._config.threads()
        with _torch_threads(threads):
            return write_sidecar(extractor, plan, self._files, self._config.batch_size, threads)


def _result(reference: Any, plan: SidecarPlan) -> ExtractionEnvironment | Sidecar:
    """Returns what an actor returned; raises its error without Ray's traceback in its message."""
    import ray

    try:
        result: ExtractionEnvironment | Sidecar = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PipelineError):
            raise error.cause from error
        if isinstance(error.cause, ModuleNotFoundError):
            raise ClusterError(
                f"extract: {error.cause} on a node of the cluster; install Sightline and what it "
                "needs on every node"
            ) from error
        raise
    except ray.exceptions.RayError as error:
        require_cluster()
        raise ClusterError(
            f"extract: an actor was lost {SHARD_RETRIES + 1} times, with its node or by itself, "
            f"over shard {plan.shard} of split {plan.split}; if memory ran out, lower "
            "features.extract.batch_size or actors"
        ) from error
    return result


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """Gives torch this many threads; their number moves the last digit of a feature.

    An extractor that has not imported torch by now does not need it, and it takes seconds.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _usable(device: str) -> str:
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(
                "extract.gpus_per_actor is above 0, but torch finds no GPU here; set it to 0"
            )
    return device


class _Rejects:
    """Counts the live samples of which no feature can be made, against the limit.

    Those of earlier runs count too: the limit is of the dataset, not of a night's work.
    """

    def __init__(self, manifest: Manifest, extractor: str, max_fraction: float) -> None:
        samples = manifest.samples(["key", "shard"])
        self.counts: Counter[str] = Counter()
        self._url = manifest.url
        self._extractor = extractor
        self._num_live = samples.num_rows
        self._max_fraction = max_fraction
        self._examples: dict[str, str] = {}
        self._counted: set[str] = set()
        listed = manifest.features(extractor).rejects()
        self._count(samples.join(listed, ["key", "shard"], join_type="inner"))

    def add(self, sidecar: Sidecar) -> None:
        """Counts those of a sidecar; raises RejectError beyond the limit."""
        rows = sidecar.rows.filter(pc.is_valid(sidecar.rows["reason"]))
        self._count(rows.filter(pc.is_in(rows["key"], pa.array(sorted(sidecar.plan.live)))))

    def _count(self, rows: pa.Table) -> None:
        for row in rows.select(["key", "reason", "detail"]).to_pylist():
            if row["key"] in self._counted:  # of a shard that was listed in part
                continue
            self._counted.add(row["key"])
            self.counts[row["reason"]] += 1
            self._examples.setdefault(row["reason"], f"{row['key']!r}: {row['detail']}")
        number = len(self._counted)
        if number <= self._max_fraction * self._num_live:
            return
        reasons = "\n".join(
            f"  {reason}: {count}, for example {self._examples[reason]}"
            for reason, count in self.counts.most_common()
        )
        raise RejectError(
            f"{self._url}: {self._extractor} can make nothing of {number} of {self._num_live} "
            f"samples, more than features.extract.max_reject_fraction={self._max_fraction:g} "
            "allows; what was listed stays. Mend or remove these images, or raise the limit\n"
            f"{reasons}"
        )


class _Meter:
    """Counts what finished sidecars report."""

    def __init__(self, num_to_do: int) -> None:
        self.num_shards = 0
        self.size_bytes = 0
        self._num_to_do = num_to_do
        self._num_done = 0
        self._seconds = 0.0
        self._network_seconds = 0.0
        self._started = time.perf_counter()

    def add(self, sidecar: Sidecar) -> None:
        self.num_shards += 1
        self.size_bytes += sidecar.size_bytes
        self._num_done += len(sidecar.plan.live)
        self._seconds += sidecar.seconds
        self._network_seconds += sidecar.network_seconds

    def progress(self) -> ExtractProgress:
        elapsed = time.perf_counter() - self._started
        return ExtractProgress(
            num_done=self._num_done,
            num_to_do=self._num_to_do,
            images_per_second=self._num_done / elapsed if self._num_done else 0.0,
            waited_fraction=1 - self._network_seconds / self._seconds if self._seconds else 0.0,
        )
