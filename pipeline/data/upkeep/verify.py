"""Verification: whether everything that a version of a dataset lists is there and whole."""

import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import (
    OPTIONAL_COLUMNS,
    FeatureRow,
    Int64Array,
    SampleRow,
    foreign_tars,
    from_table,
    matching_rows,
    part_places,
    part_suffix,
)
from pipeline.data.read.features import card_boxes
from pipeline.data.sample import Texts
from pipeline.data.tars.foreign_tar import ForeignTar
from pipeline.data.tars.members import sorted_codes
from pipeline.data.tars.shard import Member, read_member, shard_location, sidecar_location
from pipeline.data.tars.shard_files import ShardFiles
from pipeline.digest import digest_of
from pipeline.errors import FeatureError, ShardError

_THREADS = 4  # shards read at a time; hashing and reading release the interpreter's lock
_CHUNK_BYTES = 8 * 1024**2

File = TypeVar("File", str, ForeignTar)


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
    images = _by_file(kept, *_shard_of_row(kept, "shard"))
    texts = _by_file(samples, *_shard_of_row(samples, "texts_shard"))
    referring, _ = _shard_of_row(left, "shard")
    for name in sorted({*images, *texts, *referring}):
        split, _, shard = name.partition("/")
        location = shard_location(url, split, shard)
        yield partial(_check_shard, location, shard, images.get(name), texts.get(name))
    for tar, rows in _by_file(left, *foreign_tars(left["tar"])).items():
        yield partial(_check_foreign_tar, tar, rows)


def _shard_of_row(samples: pa.Table, column: str) -> tuple[list[str], Int64Array]:
    """Returns the shards, as `train/0123456789abcdef`, and for each row the number of its."""
    names = pc.binary_join_element_wise(samples["split"], samples[column], "/")
    return sorted_codes(pa.chunked_array(names.chunks, pa.string()))


def _by_file(
    samples: pa.Table, files: Sequence[File], file_of_row: Int64Array
) -> dict[File, pa.Table]:
    """Returns the rows of each file, as slices of one sorted table."""
    ordered = samples.take(np.argsort(file_of_row, kind="stable"))
    counts = np.bincount(file_of_row, minlength=len(files))
    starts = np.cumsum(counts) - counts
    return {
        file: ordered.slice(start, count)
        for file, start, count in zip(files, starts.tolist(), counts.tolist(), strict=True)
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
    for row in [] if images is None else from_table(images, SampleRow):
        place = Member(row.image_offset, row.image_size)
        payload = _member(file.descriptor, location, row.key, row.suffix, place, faults)
        if payload is not None:
            faults += _image_faults(location, row, payload)
    for row in [] if texts is None else from_table(texts, SampleRow):
        place = Member(row.texts_offset, row.texts_size)
        payload = _member(file.descriptor, location, row.key, "json", place, faults)
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
    for row in from_table(images, SampleRow):
        try:
            payload = os.pread(file.descriptor, row.image_size, row.image_offset)
        except OSError as error:
            faults.append(Fault("misplaced-member", location, row.key, str(error)))
        else:
            faults += _image_faults(location, row, payload)
    return _Found(location, os.fstat(file.descriptor).st_size, faults)


def _image_faults(location: str, row: SampleRow, payload: bytes) -> Iterator[Fault]:
    digest = digest_of(payload)
    if digest != row.digest:
        detail = f"the image has the digest {digest}, the manifest says {row.digest}"
        yield Fault("changed-image", location, row.key, detail)


def _texts_faults(location: str, row: SampleRow, payload: bytes) -> Iterator[Fault]:
    try:
        texts = Texts.from_json(payload)
    except ShardError as error:
        yield Fault("malformed-texts", location, row.key, str(error))
        return
    found = {
        "captions": (len(texts.captions), row.num_captions),
        "questions": (len(texts.questions), row.num_questions),
        "rounds": (texts.num_rounds, row.num_rounds),
    }
    for kind, (number, listed) in found.items():
        if number != listed:
            detail = f"{number} {kind}, the manifest says {listed}"
            yield Fault("miscounted-texts", location, row.key, detail)


def _current_features(manifest: Manifest, extractor: str, samples: pa.Table) -> pa.Table:
    """Returns the listed features of these samples' own shards."""
    listed = manifest.features(extractor).rows()
    return listed.filter(pa.array(matching_rows(listed, samples, ["key", "shard"]) >= 0))


def _sidecar_checks(url: str, extractor: str, listed: pa.Table) -> Iterator[_Check]:
    """Yields a check for each sidecar."""
    boxes: int | str = 0
    try:
        if (part_places(listed["parts"], "boxes")[0] < 0).any():
            boxes = len(card_boxes(url, extractor))
    except FeatureError as error:
        boxes = str(error)
    for name, rows in _by_file(listed, *sorted_codes(listed["shard"])).items():
        yield partial(_check_sidecar, sidecar_location(url, extractor, name), rows, boxes)


def _check_sidecar(
    location: str, rows: pa.Table, implied_boxes: int | str, files: ShardFiles
) -> _Found:
    """`implied_boxes`: how many boxes the card implies, or why it does not say."""
    try:
        file = files.open(location)
        _, size_bytes = file.digest(_CHUNK_BYTES)
    except ShardError as error:
        return _Found(location, 0, [Fault("unreadable-file", location, "", str(error))])
    faults: list[Fault] = []
    form = ""
    for row in from_table(rows, FeatureRow):
        payloads = {}
        for part in row.parts:
            place = Member(part.offset, part.size)
            suffix = part_suffix(part.name)
            payload = _member(file.descriptor, location, row.key, suffix, place, faults)
            if payload is not None:
                payloads[part.name] = payload
        values = _array(location, row.key, "values", payloads, faults)
        if values is not None:
            row_form = f"{values.shape[-1]} {values.dtype} values a region"
            form = form or row_form
            if values.ndim != 2 or len(values) != row.num_regions:
                detail = (
                    f"values of shape {values.shape}, the manifest says {row.num_regions} regions"
                )
                faults.append(Fault("misshapen-feature", location, row.key, detail))
            elif row_form != form:
                detail = f"{row_form}, but {form} in the samples before it"
                faults.append(Fault("misshapen-feature", location, row.key, detail))
            elif values.dtype.kind == "f" and not np.isfinite(values).all():
                detail = "values that are no numbers, or infinite"
                faults.append(Fault("not-finite", location, row.key, detail))
        if not any(part.name == "boxes" for part in row.parts):
            if isinstance(implied_boxes, str):
                faults.append(Fault("missing-boxes", location, row.key, implied_boxes))
            elif implied_boxes != row.num_regions:
                detail = f"{row.num_regions} regions, but the card implies {implied_boxes} boxes"
                faults.append(Fault("misshapen-feature", location, row.key, detail))
            continue
        boxes = _array(location, row.key, "boxes", payloads, faults)
        if boxes is not None and boxes.shape != (row.num_regions, 4):
            detail = f"boxes of shape {boxes.shape}, expected ({row.num_regions}, 4)"
            faults.append(Fault("misshapen-feature", location, row.key, detail))
    return _Found(location, size_bytes, faults, form)


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
    location: str, key: str, part: str, payloads: Mapping[str, bytes], faults: list[Fault]
) -> np.ndarray | None:
    """Returns an array of a feature, or adds a fault if the payload, if there is one, is none."""
    if part not in payloads:
        return None
    try:
        array: np.ndarray = np.load(io.BytesIO(payloads[part]), allow_pickle=False)
    except (ValueError, EOFError) as error:
        detail = f"its {part} are no .npy payload ({error})"
        faults.append(Fault("malformed-feature", location, key, detail))
        return None
    return array


def _member(
    descriptor: int, location: str, key: str, suffix: str, place: Member, faults: list[Fault]
) -> bytes | None:
    """Returns a part's payload, or adds a fault if it does not lie where the manifest says."""
    try:
        return read_member(descriptor, f"{key}.{suffix}", place.offset, place.size)
    except ShardError as error:
        faults.append(Fault("misplaced-member", location, key, str(error)))
        return None
