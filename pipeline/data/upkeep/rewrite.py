"""The rewriting of worn and small shards: the same samples, texts and features in fewer files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from msgspec.structs import replace

from pipeline import storage
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import (
    FeaturePart,
    FeatureRow,
    SampleRow,
    State,
    from_table,
    matching_rows,
    part_suffix,
    to_table,
)
from pipeline.data.sample import Sample
from pipeline.data.tars.members import Int64Array, sorted_codes
from pipeline.data.tars.shard import (
    Member,
    Shard,
    ShardWriter,
    read_member,
    shard_location,
    sidecar_location,
    stored_bytes,
)
from pipeline.data.tars.shard_files import ShardFiles
from pipeline.digest import digest_of
from pipeline.errors import ShardError

_SMALL = 0.5  # a shard with fewer samples than this share of the fullest one is joined with others

_FEATURE_OF = ("key", "shard")


@dataclass(frozen=True)
class RewritePlan:
    """Live samples that go into one new shard, in its order."""

    url: str
    split: str
    samples: pa.Table  # schema SAMPLES
    texts_only: bool  # the images stay where they are
    features: Mapping[
        str, pa.Table
    ]  # schema FEATURES, by extractor, row for row; to be carried over


@dataclass(frozen=True)
class Rewritten:
    """A shard and its sidecars, written and not listed yet."""

    shard: Shard
    samples: pa.Table  # schema SAMPLES: the rows of the plan, lying elsewhere
    features: Mapping[str, pa.Table]  # schema FEATURES


def plan_rewrites(manifest: Manifest, min_live_fraction: float) -> list[RewritePlan]:
    """Returns the shards to write: of samples in shards that are mostly dead, or small.

    Dead is what no live sample of this version uses. A shard is joined only with others of its
    split that have the features of the same extractors, so that these are complete for the new
    one too. Images in tars of others stay there, and so do the shards that refer to them. With
    nothing dead or small there is nothing to do.
    """
    samples = manifest.samples()
    samples = samples.take(np.argsort(_hashes(samples["key"]), kind="stable"))
    features = {name: manifest.features(name).rows() for name in manifest.extractors()}
    usage = _Usage(manifest.url, samples, min_live_fraction, _most_samples(manifest))
    complete = _complete_features(samples, features, usage.image_shard, len(usage.names))
    plans: list[RewritePlan] = []
    moved = np.zeros(samples.num_rows, bool)
    left = np.asarray(pc.is_valid(samples["tar"]))
    for group in usage.groups(np.where(left, -1, usage.image_shard), complete):
        moved[group] = True
        usage.leave_texts(group)
        extractors = complete[usage.image_shard[group[0]]]
        for rows in map(samples.take, usage.cut(group)):
            carried = {name: _of(features[name], rows) for name in extractors}
            plans.append(RewritePlan(manifest.url, rows["split"][0].as_py(), rows, False, carried))

    apart = (usage.image_shard != usage.texts_shard) & ~moved
    texts_shard = np.where(apart, usage.texts_shard, -1)
    for group in usage.groups(texts_shard, [()] * len(usage.names)):
        for rows in map(samples.take, usage.cut(group)):
            plans.append(RewritePlan(manifest.url, rows["split"][0].as_py(), rows, True, {}))
    return plans


def rewrite(plan: RewritePlan, files: ShardFiles) -> Rewritten:
    """Writes the shard of a plan, then the sidecars with the features its samples have now.

    Safe to repeat: the same plan gives the same bytes under the same names. Raises ShardError if
    a sample, or a feature, is not as the manifest says: a fault is not copied under a new digest.
    """
    rows = []
    with ShardWriter(storage.join(plan.url, "shards", plan.split)) as writer:
        for row in from_table(plan.samples, SampleRow):
            texts = Member(row.texts_offset, row.texts_size)
            parts = {"json": _part(plan, row, row.texts_shard, "json", texts, files)}
            if not plan.texts_only:
                parts[row.suffix] = _image(plan, row, files)
            members = writer.write(Sample(row.key, parts))
            texts = members["json"]
            row = replace(row, texts_offset=texts.offset, texts_size=texts.size, sequence=-1)
            if not plan.texts_only:
                image = members[row.suffix]
                row = replace(row, image_offset=image.offset, image_size=image.size)
            rows.append(row)
    name = writer.shard.name
    rows = [
        replace(row, texts_shard=name, shard=row.shard if plan.texts_only else name) for row in rows
    ]
    features = {
        extractor: _carry_over(plan.url, extractor, name, listed, files)
        for extractor, listed in plan.features.items()
    }
    return Rewritten(writer.shard, to_table(rows, SampleRow), features)


def _carry_over(
    url: str, extractor: str, shard: str, listed: pa.Table, files: ShardFiles
) -> pa.Table:
    """Copies features, byte for byte, into the sidecar of the new shard; returns its rows."""
    rows = []
    with ShardWriter(storage.join(url, "features", extractor), shard) as writer:
        for row in from_table(listed, FeatureRow):
            parts = row.parts
            if row.reason is None:  # else there is no feature to be copied
                location = sidecar_location(url, extractor, row.shard)
                parts = _copied(writer, row, files.open(location).descriptor, location)
            rows.append(replace(row, shard=shard, parts=parts, sequence=-1))
    return to_table(rows, FeatureRow)


def _copied(
    writer: ShardWriter, row: FeatureRow, descriptor: int, location: str
) -> tuple[FeaturePart, ...]:
    payloads = {}
    for part in row.parts:
        suffix = part_suffix(part.name)
        try:
            payloads[suffix] = read_member(
                descriptor, f"{row.key}.{suffix}", part.offset, part.size
            )
        except ShardError as error:
            raise ShardError(
                f"{location}: sample {row.key!r}: its features do not lie where the manifest "
                f"says ({error}); `sightline data verify` finds all such faults"
            ) from error
    members = writer.write(Sample(row.key, payloads))
    return tuple(FeaturePart(part.name, *members[part_suffix(part.name)]) for part in row.parts)


def _image(plan: RewritePlan, row: SampleRow, files: ShardFiles) -> bytes:
    place = Member(row.image_offset, row.image_size)
    payload = _part(plan, row, row.shard, row.suffix, place, files)
    if digest_of(payload) != row.digest:
        location = shard_location(plan.url, plan.split, row.shard)
        raise ShardError(
            f"{location}: sample {row.key!r}: the image is not the one that was stored; "
            "`sightline data verify` finds all such faults"
        )
    return payload


def _part(
    plan: RewritePlan, row: SampleRow, shard: str, suffix: str, place: Member, files: ShardFiles
) -> bytes:
    location = shard_location(plan.url, plan.split, shard)
    descriptor = files.open(location).descriptor
    try:
        return read_member(descriptor, f"{row.key}.{suffix}", place.offset, place.size)
    except ShardError as error:
        raise ShardError(f"{location}: sample {row.key!r}: {error}") from error


class _Usage:
    """How much of each shard the live samples use. A shard's number is its place in `names`."""

    def __init__(
        self, url: str, samples: pa.Table, min_live_fraction: float, samples_per_shard: int
    ) -> None:
        num_rows = samples.num_rows
        columns = [
            pc.binary_join_element_wise(samples["split"], samples[shard], "/")
            for shard in ("shard", "texts_shard")
        ]
        # Of a shard its split and name, as `train/0123456789abcdef`.
        names = pa.chunked_array([chunk for column in columns for chunk in column.chunks])
        self.names, shard_of_part = sorted_codes(names.cast(pa.string()))
        self.image_shard, self.texts_shard = shard_of_part[:num_rows], shard_of_part[num_rows:]

        self._texts_bytes = stored_bytes(samples["texts_size"].to_numpy())
        image_bytes = stored_bytes(samples["image_size"].to_numpy())
        part_bytes = np.concatenate([image_bytes, self._texts_bytes])
        num_shards = len(self.names)
        self._live_bytes = np.bincount(shard_of_part, part_bytes, minlength=num_shards)
        self._enough_bytes = min_live_fraction * np.array(list(_sizes(url, self.names)))
        self._samples_per_shard = samples_per_shard

    def groups(
        self, shard_of_row: Int64Array, alike: Sequence[tuple[str, ...]]
    ) -> list[Int64Array]:
        """Returns the rows of each group of shards that are to be written as one.

        Rows of shard -1 do not count. `alike` says of each shard what those of a group have in
        common, beside the split.
        """
        counts = np.bincount(shard_of_row + 1, minlength=len(self.names) + 1)[1:]
        worn = self._live_bytes < self._enough_bytes
        small = counts < _SMALL * self._samples_per_shard
        shards: dict[tuple[str, tuple[str, ...]], list[int]] = {}
        for shard in np.flatnonzero((counts > 0) & (worn | small)).tolist():
            split = self.names[shard].partition("/")[0]
            shards.setdefault((split, alike[shard]), []).append(shard)
        return [
            np.flatnonzero(np.isin(shard_of_row, group))
            for _, group in sorted(shards.items())
            if len(group) > 1 or worn[group[0]]
        ]

    def leave_texts(self, rows: Int64Array) -> None:
        """Counts the texts of these rows as dead: they go where the images go."""
        texts_bytes = self._texts_bytes[rows]
        self._live_bytes -= np.bincount(
            self.texts_shard[rows], texts_bytes, minlength=len(self.names)
        )

    def cut(self, rows: Int64Array) -> Iterator[Int64Array]:
        """Cuts a group into shards as full as the fullest there is."""
        for start in range(0, len(rows), self._samples_per_shard):
            yield rows[start : start + self._samples_per_shard]


def _most_samples(manifest: Manifest) -> int:
    """Returns how many samples the fullest shard was written with, as far as is known yet."""
    rows = manifest.rows_after(-1, ["state", "shard", "tar", "key"])
    rows = rows.filter(pc.and_(pc.equal(rows["state"], State.LIVE), pc.is_null(rows["tar"])))
    samples = rows.group_by(["shard", "key"]).aggregate([])
    return max(samples["shard"].value_counts().field("counts").to_pylist(), default=1)


def _sizes(url: str, names: Sequence[str]) -> Iterator[int]:
    """Yields the size in bytes of each `split/name`; 0 if it is absent."""
    folders: dict[str, dict[str, storage.FileStatus]] = {}
    for split, _, name in (name.partition("/") for name in names):
        if split not in folders:
            folders[split] = storage.list_files(storage.join(url, "shards", split))
        status = folders[split].get(f"{name}.tar")
        yield status.size_bytes if status else 0


def _complete_features(
    samples: pa.Table, features: Mapping[str, pa.Table], shard_of_row: Int64Array, num_shards: int
) -> list[tuple[str, ...]]:
    """Returns for each shard the extractors that list features of all its live samples."""
    complete: list[tuple[str, ...]] = [()] * num_shards
    for name, listed in sorted(features.items()):
        lacking = np.zeros(num_shards, bool)
        lacking[shard_of_row[matching_rows(samples, listed, _FEATURE_OF) < 0]] = True
        complete = [
            extractors if lacks else (*extractors, name)
            for extractors, lacks in zip(complete, lacking.tolist(), strict=True)
        ]
    return complete


def _of(listed: pa.Table, samples: pa.Table) -> pa.Table:
    """Returns the features of these samples, row for row."""
    return listed.take(pa.array(matching_rows(samples, listed, _FEATURE_OF)))


def _hashes(keys: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """The order in which ingest, too, puts samples into shards."""
    hashed = (xxhash.xxh3_64_intdigest(key.encode()) for key in keys.to_pylist())
    return np.fromiter(hashed, np.uint64)
