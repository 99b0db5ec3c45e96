"""Verification: whether everything that a version of a dataset lists is there and whole."""

import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline import storage
from pipeline.data.manifest.manifest import OPTIONAL_COLUMNS, Manifest
from pipeline.data.read.features import card_boxes
from pipeline.data.read.sidecar_layout import SidecarLayout, card_layout
from pipeline.data.sample import Texts
from pipeline.data.tars.foreign_tar import ForeignTar
from pipeline.data.tars.members import sorted_codes
from pipeline.data.tars.shard import read_member, shard_location, sidecar_location
from pipeline.data.tars.shard_files import ShardFiles
from pipeline.errors import FeatureError, ShardError

_THREADS = 4  # shards read at a time; hashing and reading release the interpreter's lock
_CHUNK_BYTES = 8 * 1024**2

_PART_COLUMNS = {
    "image": ("key", "suffix", "image_offset", "image_size", "digest"),
    "texts": (
        "key", "texts_offset", "texts_size", "num_captions", "num_questions", "num_rounds",
    ),
}  # fmt: skip
_FEATURE_COLUMNS = (
    "key", "shard", "values_offset", "values_size", "boxes_offset", "boxes_size", "num_regions",
    "reason",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """One thing that is not as the manifest says. `kind` is a short slug."""

    kind: str
    location: str  # the file
    key: str  # the sample; empty if the whole file is meant
    detail: str


@dataclass(frozen=True)
class Coverage:
    """How many live samples have an extractor's features."""

    num_samples: int
    num_missing: int  # to be made by the next extract; no fault
    num_rejects: int  # of which the extractor can make nothing; no fault


@dataclass(frozen=True)
class Verification:
    """What was looked at, and what is wrong with it."""

    version: int
    num_samples: int
    num_files: int  # shards and sidecars
    size_bytes: int
    features: dict[str, Coverage]
    faults: tuple[Fault, ...]


class _Found(NamedTuple):
    """What the check of one file has found. `form` is what the others should have too."""

    location: str
    size_bytes: int
    faults: list[Fault]
    form: str = ""


def _ignore_progress(_num_done: int, _num_to_do: int) -> None: ...


def verify(
    url: str,
    version: int | None = None,
    on_progress: Callable[[int, int], None] = _ignore_progress,
) -> Verification:
    """Reads every byte that a version lists, and compares it with what the manifest says.

    Shards: the digest of the file against its name, each member's tar header against key, suffix
    and size, the digest of each image, the texts against their counts. Tars of others: whether
    they are those that were indexed, and the digest of each image at its place. Sidecars: headers
    likewise, the shapes against the number of regions, one width and type for all of an
    extractor, finite values. Sidecars have no digest to compare with.

    `on_progress` is told the files done and to do. Raises ManifestError if there is no dataset.
    """
    manifest = Manifest.open(url, version)
    samples = manifest.samples()
    complete, faults = _complete(manifest, samples)
    checks = list(_shard_checks(manifest.url, complete))
    features = {}
    for extractor in manifest.extractors():
        listed = _current_features(manifest, extractor, complete)
        num_missing = samples.num_rows - listed.num_rows
        num_rejects = listed.num_rows - listed["reason"].null_count
        listed = listed.filter(pc.is_null(listed["reason"]))
        features[extractor] = Coverage(listed.num_rows, num_missing, num_rejects)
        checks += _sidecar_checks(manifest.url, extractor, listed)

    results: list[_Found] = []
    on_progress(0, len(checks))
    # A cache of its own: a copy made earlier says nothing about the object store.
    with (
        TemporaryDirectory(prefix="sightline-verify-") as cache,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        files = ShardFiles(Path(cache), cache_size_bytes=0, max_open=_THREADS)
        running = [pool.submit(check, files) for check in checks]
        try:
            for number, check in enumerate(running, start=1):
                results.append(check.result())
                on_progress(number, len(checks))
        finally:
            pool.shutdown(cancel_futures=True)
    faults += [fault for found in results for fault in found.faults]
    for extractor in features:
        folder = storage.join(manifest.url, "features", extractor, "")
        faults += _odd_ones([found for found in results if found.location.startswith(folder)])
    return Verification(
        version=manifest.version,
        num_samples=samples.num_rows,
        num_files=len(checks),
        size_bytes=sum(found.size_bytes for found in results),
        features=features,
        faults=tuple(faults),
    )


def _complete(manifest: Manifest, samples: pa.Table) -> tuple[pa.Table, list[Fault]]:
    """Returns the rows of live samples that lack nothing, and a fault for each other one."""
    whole = np.ones(samples.num_rows, bool)
    lacking: dict[int, list[str]] = {}
    for name in (name for name in samples.column_names if name not in OPTIONAL_COLUMNS):
        null = np.asarray(pc.is_null(samples[name]))
        whole &= ~null
        for row in np.flatnonzero(null).tolist():
            lacking.setdefault(row, []).append(name)
    location = storage.join(manifest.url, "manifest", "samples")
    faults = [
        Fault(
            "incomplete-row",
            location,
            samples["key"][row].as_py() or "",
            f"the row of a live sample has no {', '.join(names)}",
        )
        for row, names in sorted(lacking.items())
    ]
    return samples.filter(pa.array(whole)), faults


_Check = Callable[[ShardFiles], _Found]


def _shard_checks(url: str, samples: pa.Table) -> Iterator[_Check]:
    """Yields a check for each tar that holds images or texts of these samples."""
    kept, left = (samples.filter(is_kept(samples["tar"])) for is_kept in (pc.is_null, pc.is_valid))
    images = _by_file(kept, _shard_of_row(kept, "shard"), _PART_COLUMNS["image"])
    texts = _by_file(samples, _shard_of_row(samples, "texts_shard"), _PART_COLUMNS["texts"])
    referring = pc.unique(_shard_of_row(left, "shard")).to_pylist()
    for name in sorted({*images, *texts, *referring}):
        split, _, shard = name.partition("/")
        location = shard_location(url, split, shard)
        yield partial(_check_shard, location, shard, images.get(name), texts.get(name))
    for name, rows in _by_file(left, left["tar"], _PART_COLUMNS["image"]).items():
        yield partial(_check_foreign_tar, ForeignTar.named(name), rows)


def _shard_of_row(samples: pa.Table, column: str) -> pa.ChunkedArray:
    """Returns split and shard of each row, as `train/0123456789abcdef`."""
    return pc.binary_join_element_wise(samples["split"], samples[column], "/")


def _by_file(
    samples: pa.Table, file_of_row: pa.ChunkedArray, columns: Sequence[str]
) -> dict[str, pa.Table]:
    """Returns the rows of each file, as slices of one sorted table."""
    names, codes = sorted_codes(pa.chunked_array(file_of_row.chunks, pa.string()))
    ordered = samples.select(list(columns)).take(np.argsort(codes, kind="stable"))
    counts = np.bincount(codes, minlength=len(names))
    starts = np.cumsum(counts) - counts
    return {
        name: ordered.slice(start, count)
        for name, start, count in zip(names, starts.tolist(), counts.tolist(), strict=True)
    }


def _check_shard(
    location: str,
    name: str,
    images: pa.Table | None,
    texts: pa.Table | None,
    files: ShardFiles,
) -> _Found:
    try:
        file = files.open(location)
        digest, size_bytes = file.digest(_CHUNK_BYTES)
    except ShardError as error:
        return _Found(location, 0, [Fault("unreadable-file", location, "", str(error))])
    faults = []
    if digest[: len(name)] != name:
        detail = f"its bytes have the digest {digest[: len(name)]}, which should be its name"
        faults.append(Fault("changed-file", location, "", detail))
    for row in [] if images is None else images.to_pylist():
        payload = _member(file.descriptor, location, row, "image", row["suffix"], faults)
        if payload is not None:
            faults += _image_faults(location, row, payload)
    for row in [] if texts is None else texts.to_pylist():
        payload = _member(file.descriptor, location, row, "texts", "json", faults)
        if payload is not None:
            faults += _texts_faults(location, row, payload)
    return _Found(location, size_bytes, faults)


def _check_foreign_tar(tar: ForeignTar, images: pa.Table, files: ShardFiles) -> _Found:
    location = str(tar)
    try:
        file = files.open(tar)
    except ShardError as error:
        return _Found(location, 0, [Fault("unreadable-file", location, "", str(error))])
    faults: list[Fault] = []
    for row in images.to_pylist():
        try:
            payload = os.pread(file.descriptor, row["image_size"], row["image_offset"])
        except OSError as error:
            faults.append(Fault("misplaced-member", location, row["key"], str(error)))
        else:
            faults += _image_faults(location, row, payload)
    return _Found(location, os.fstat(file.descriptor).st_size, faults)


def _image_faults(location: str, row: dict[str, Any], payload: bytes) -> Iterator[Fault]:
    digest = xxhash.xxh3_128_hexdigest(payload)
    if digest != row["digest"]:
        detail = f"the image has the digest {digest}, the manifest says {row['digest']}"
        yield Fault("changed-image", location, row["key"], detail)


def _texts_faults(location: str, row: dict[str, Any], payload: bytes) -> Iterator[Fault]:
    try:
        texts = Texts.from_json(payload)
    except ShardError as error:
        yield Fault("malformed-texts", location, row["key"], str(error))
        return
    found = {
        "captions": len(texts.captions),
        "questions": len(texts.questions),
        "rounds": texts.num_rounds,
    }
    for kind, number in found.items():
        if number != row[f"num_{kind}"]:
            detail = f"{number} {kind}, the manifest says {row[f'num_{kind}']}"
            yield Fault("miscounted-texts", location, row["key"], detail)


def _current_features(manifest: Manifest, extractor: str, samples: pa.Table) -> pa.Table:
    """Returns the listed features of these samples' own shards."""
    listed = manifest.features(extractor).rows(_FEATURE_COLUMNS)
    names = ["key", "shard"]
    return listed.join(samples.select(names), names, join_type="inner")


def _sidecar_checks(url: str, extractor: str, listed: pa.Table) -> Iterator[_Check]:
    """Yields a check for each sidecar."""
    boxes: int | str = 0
    try:
        if pc.any(pc.less(listed["boxes_offset"], 0)).as_py():
            boxes = len(card_boxes(url, extractor))
    except FeatureError as error:
        boxes = str(error)
    layout = card_layout(url, extractor)
    names, codes = sorted_codes(listed["shard"])
    listed = listed.take(np.argsort(codes, kind="stable"))
    ends = np.cumsum(np.bincount(codes, minlength=len(names)))
    for name, start, end in zip(names, [0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        rows = listed.slice(start, end - start)
        location = sidecar_location(url, extractor, name)
        yield partial(_check_sidecar, location, rows, boxes, layout)


def _check_sidecar(
    location: str,
    rows: pa.Table,
    implied_boxes: int | str,
    layout: SidecarLayout,
    files: ShardFiles,
) -> _Found:
    """`implied_boxes`: how many boxes the card implies, or why it does not say."""
    try:
        file = files.open(location)
        _, size_bytes = file.digest(_CHUNK_BYTES)
    except ShardError as error:
        return _Found(location, 0, [Fault("unreadable-file", location, "", str(error))])
    faults: list[Fault] = []
    form = ""
    for row in rows.to_pylist():
        key, num_regions = row["key"], row["num_regions"]
        values = _array(file.descriptor, location, row, "values", "npy", faults)
        if values is not None:
            row_form = f"{values.shape[-1]} {values.dtype} values a region"
            form = form or row_form
            if values.ndim != 2 or len(values) != num_regions:
                detail = f"values of shape {values.shape}, the manifest says {num_regions} regions"
                faults.append(Fault("misshapen-feature", location, key, detail))
            elif row_form != form:
                detail = f"{row_form}, but {form} in the samples before it"
                faults.append(Fault("misshapen-feature", location, key, detail))
            elif values.dtype.kind == "f" and not np.isfinite(values).all():
                detail = "values that are no numbers, or infinite"
                faults.append(Fault("not-finite", location, key, detail))
        if row["boxes_offset"] < 0:
            if isinstance(implied_boxes, str):
                faults.append(Fault("missing-boxes", location, key, implied_boxes))
            elif implied_boxes != num_regions:
                detail = f"{num_regions} regions, but the card implies {implied_boxes} boxes"
                faults.append(Fault("misshapen-feature", location, key, detail))
            continue
        boxes = _array(file.descriptor, location, row, "boxes", "boxes.npy", faults)
        if boxes is not None and boxes.shape != (num_regions, 4):
            detail = f"boxes of shape {boxes.shape}, expected ({num_regions}, 4)"
            faults.append(Fault("misshapen-feature", location, key, detail))
    faults += _part_faults(file.descriptor, location, rows, layout)
    return _Found(location, size_bytes, faults, form)


def _part_faults(
    descriptor: int, location: str, rows: pa.Table, layout: SidecarLayout
) -> Iterator[Fault]:
    """Looks for the parts that the manifest does not list, where the card implies them."""
    places = layout.places(
        rows["values_offset"].to_numpy(),
        rows["values_size"].to_numpy(),
        rows["num_regions"].to_numpy(),
        with_boxes=pc.all(pc.greater_equal(rows["boxes_offset"], 0)).as_py(),
    )
    for name in layout.arrays:
        offsets, sizes = places[name]
        for key, offset, size in zip(
            rows["key"].to_pylist(), offsets.tolist(), sizes.tolist(), strict=True
        ):
            try:
                read_member(descriptor, f"{key}.{name}.npy", offset, size)
            except ShardError as error:
                yield Fault("misplaced-member", location, key, str(error))


def _odd_ones(sidecars: Sequence[_Found]) -> list[Fault]:
    """Returns a fault for each sidecar whose values are of another form than most."""
    forms = Counter(found.form for found in sidecars if found.form)
    usual = max(sorted(forms), key=forms.__getitem__, default="")
    return [
        Fault("misshapen-feature", found.location, "", f"{found.form}, but {usual} in most files")
        for found in sidecars
        if found.form not in ("", usual)
    ]


def _array(
    descriptor: int,
    location: str,
    row: dict[str, Any],
    part: str,
    suffix: str,
    faults: list[Fault],
) -> np.ndarray | None:
    payload = _member(descriptor, location, row, part, suffix, faults)
    if payload is None:
        return None
    try:
        array: np.ndarray = np.load(io.BytesIO(payload), allow_pickle=False)
    except (ValueError, EOFError) as error:
        detail = f"its {part} are no .npy payload ({error})"
        faults.append(Fault("malformed-feature", location, row["key"], detail))
        return None
    return array


def _member(
    descriptor: int,
    location: str,
    row: dict[str, Any],
    part: str,
    suffix: str,
    faults: list[Fault],
) -> bytes | None:
    """Returns a part's payload, or adds a fault if it does not lie where the manifest says."""
    try:
        return read_member(
            descriptor, f"{row['key']}.{suffix}", row[f"{part}_offset"], row[f"{part}_size"]
        )
    except ShardError as error:
        faults.append(Fault("misplaced-member", location, row["key"], str(error)))
        return None
