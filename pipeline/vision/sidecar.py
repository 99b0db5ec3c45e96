"""The sidecar writer: the features of one shard's images in one tar.

An image of which the extractor can make nothing has none, and is listed with the reason instead.
"""

import contextlib
import io
import json
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.data.manifest.schema import FeaturePart, FeatureRow, part_suffix, to_table
from pipeline.data.sample import Sample
from pipeline.data.tars.foreign_tar import ForeignTar, ImageReference
from pipeline.data.tars.shard import ShardWriter, list_members, read_member, shard_location
from pipeline.data.tars.shard_files import ShardFiles
from pipeline.errors import FeatureError, ShardError, UnusableImageError
from pipeline.look_ahead import map_ahead, run_ahead
from pipeline.reason import Reason
from pipeline.vision.extractor import Extractor
from pipeline.vision.feature import Feature, Mask
from pipeline.vision.preprocess.image import Prepared

BATCHES_AHEAD = 2  # decoded and waiting for the network, or computed and waiting to be written


@dataclass(frozen=True)
class SidecarPlan:
    """A shard whose features are wanted, and which of its samples are live."""

    url: str  # the dataset's
    split: str
    shard: str
    live: frozenset[str]
    tar: ForeignTar | None = None  # that holds the images, if the shard only refers to them

    def location(self) -> str:
        """Where the shard is."""
        return shard_location(self.url, self.split, self.shard)


@dataclass(frozen=True)
class Sidecar:
    """A published sidecar, not listed yet, with the rows that list it."""

    plan: SidecarPlan
    rows: pa.Table  # schema FEATURES; those with a reason are rejects
    size_bytes: int
    seconds: float
    network_seconds: float  # of `seconds`, those in which the network had work


@dataclass(frozen=True)
class _Batch:
    keys: list[str]
    prepared: list[Prepared]
    rejects: list[tuple[str, FeatureError]]  # met since the batch before


@dataclass(frozen=True)
class _Computed:
    keys: list[str]
    features: list[Feature]
    rejects: list[tuple[str, FeatureError]]
    seconds: float


def write_sidecar(
    extractor: Extractor, plan: SidecarPlan, files: ShardFiles, batch_size: int, threads: int
) -> Sidecar:
    """Computes and publishes the features of a shard.

    A pure function of the shard, the extractor and, in the last digit, of batch size, device and
    libraries: repeated, it gives the same bytes under the same name. Hence it also takes the
    samples that are no longer live, and two runs at once do no harm. `threads` decode ahead of the
    network, and writing goes on beside it.

    Raises ShardError if a live sample is missing, and FeatureError naming samples if the network
    fails on images that could be prepared.
    """
    started = time.perf_counter()
    batches = run_ahead(_batches(extractor, plan, files, batch_size, threads), BATCHES_AHEAD)
    computed = run_ahead(_compute(extractor, plan, batches), BATCHES_AHEAD)
    rows: list[FeatureRow] = []
    num_features, network_seconds = 0, 0.0
    with ShardWriter(storage.join(plan.url, "features", extractor.name), plan.shard) as writer:
        for batch in computed:
            network_seconds += batch.seconds
            num_features += len(batch.features)
            for key, feature in zip(batch.keys, batch.features, strict=True):
                rows.append(write_feature(writer, plan.shard, key, feature))
            rows += [list_reject(plan.shard, key, error) for key, error in batch.rejects]
        absent = sorted(plan.live.difference(row.key for row in rows))
        if absent:
            raise ShardError(
                f"{plan.location()}: {len(absent)} samples that the manifest lists are not in it, "
                f"{absent[0]!r} the first of them; the file was cut short or replaced"
            )
    return Sidecar(
        plan,
        to_table(rows, FeatureRow),
        writer.shard.size_bytes if num_features else 0,  # an empty one is not published
        time.perf_counter() - started,
        network_seconds,
    )


def shard_images(plan: SidecarPlan, files: ShardFiles) -> Generator[tuple[str, bytes], None, None]:
    """Yields key and image of every sample of a shard that has one, in the shard's order.

    Images that the shard refers to come from the tar of others that holds them. One that is not
    there as it was is a ShardError if its sample is live; else it is left out.
    """
    file = files.open(plan.location())
    images = None if plan.tar is None else files.open(plan.tar)
    for name, image in _parts(plan.location(), file.descriptor):
        key, _, suffix = name.partition(".")
        if suffix == "json":
            continue
        if images is not None:
            try:
                image = ImageReference.from_json(image).read(images.descriptor)
            except ShardError as error:
                if key in plan.live:
                    raise ShardError(f"{plan.tar}: sample {key!r}: {error}") from error
                continue
        yield key, image


def _parts(location: str, descriptor: int) -> Generator[tuple[str, bytes], None, None]:
    """Yields name and payload of every part of a shard of ours, which must be whole."""
    try:
        for name, member in list_members(descriptor):
            yield name, read_member(descriptor, name, member.offset, member.size)
    except (ShardError, OSError) as error:
        raise ShardError(f"{location}: cannot be read ({error})") from error


def _batches(
    extractor: Extractor, plan: SidecarPlan, files: ShardFiles, batch_size: int, threads: int
) -> Generator[_Batch, None, None]:
    """Yields decoded batches in the shard's order; a pool decodes one batch beyond each."""
    batch = _Batch([], [], [])

    def prepare(sample: tuple[str, bytes]) -> tuple[str, Prepared | FeatureError]:
        key, image = sample
        try:
            return key, extractor.prepare(image)
        except FeatureError as error:
            return key, error

    images = shard_images(plan, files)
    with contextlib.closing(map_ahead(prepare, images, threads, batch_size)) as found:
        for key, prepared in found:
            if isinstance(prepared, FeatureError):
                batch.rejects.append((key, prepared))
            else:
                batch.keys.append(key)
                batch.prepared.append(prepared)
            if len(batch.keys) == batch_size:
                yield batch
                batch = _Batch([], [], [])
        if batch.keys or batch.rejects:
            yield batch


def _compute(
    extractor: Extractor, plan: SidecarPlan, batches: Generator[_Batch, None, None]
) -> Generator[_Computed, None, None]:
    for batch in batches:
        started = time.perf_counter()
        try:
            features = extractor.extract(batch.prepared) if batch.keys else []
        except FeatureError as error:
            raise FeatureError(
                f"{plan.location()}: samples {batch.keys[0]!r} to {batch.keys[-1]!r}: {error}"
            ) from error
        yield _Computed(batch.keys, features, batch.rejects, time.perf_counter() - started)


def write_feature(writer: ShardWriter, shard: str, key: str, feature: Feature) -> FeatureRow:
    """Appends a feature to the sidecar and returns the row that lists it."""
    quantized = feature.quantized
    arrays: dict[str, np.ndarray] = {
        "values": feature.values if quantized is None else quantized.levels
    }
    if quantized is not None:
        arrays["scales"] = quantized.scales
    if feature.boxes is not None:
        arrays["boxes"] = feature.boxes
    arrays |= feature.parts
    payloads = {name: _npy(array) for name, array in arrays.items()}
    if feature.masks is not None:
        payloads["segments"] = _segments(feature.masks)
    suffixes = {name: part_suffix(name) for name in payloads}
    parts = {suffixes[name]: payload for name, payload in payloads.items()}
    members = writer.write(Sample(key, parts))
    return FeatureRow(
        key=key,
        shard=shard,
        num_regions=len(feature.values),
        parts=tuple(FeaturePart(name, *members[suffix]) for name, suffix in suffixes.items()),
    )


def list_reject(shard: str, key: str, error: FeatureError) -> FeatureRow:
    """Returns the row that lists an image without a feature, with the reason."""
    reason, detail = Reason.UNUSABLE_IMAGE, str(error)
    if isinstance(error, UnusableImageError):
        reason, detail = error.reason, error.detail
    return FeatureRow(key=key, shard=shard, reason=reason, detail=detail)


def _npy(array: np.ndarray) -> bytes:
    payload = io.BytesIO()
    np.lib.format.write_array(payload, np.ascontiguousarray(array), allow_pickle=False)
    return payload.getvalue()


def _segments(masks: Sequence[Mask]) -> bytes:
    """Returns the masks as COCO's annotation files have them, one for each region."""
    document = [{"size": [mask.height, mask.width], "counts": mask.counts} for mask in masks]
    return json.dumps(document, separators=(",", ":")).encode()


def prepared_images(
    extractor: Extractor, plans: Iterable[SidecarPlan], files: ShardFiles, count: int
) -> list[Prepared]:
    """Returns at most `count` live images of some shards that the extractor can use, prepared."""
    found: list[Prepared] = []
    for plan in plans:
        for key, image in shard_images(plan, files):
            if len(found) == count:
                return found
            if key in plan.live:
                with contextlib.suppress(FeatureError):  # listed when its shard is written
                    found.append(extractor.prepare(image))
    return found
