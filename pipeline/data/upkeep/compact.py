"""Compaction: a dataset as small as what its kept versions list.

First shards that are mostly dead, and small ones, are written anew and listed with the features
they had; then the manifest is written without superseded rows; last, files go that no kept version
lists. Each step leaves a valid dataset, so that a compaction that is killed is finished by the
next one, and others may ingest, extract and read meanwhile.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime
from itertools import islice

import pyarrow as pa

from pipeline import storage
from pipeline.data.manifest.index_build import remove_unused_indexes
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.pending_commits import PendingCommits
from pipeline.data.manifest.retention import DEFAULT_RETENTION, Retention, needed_by
from pipeline.data.tars.shard import shard_location, sidecar_location
from pipeline.data.tars.shard_files import ShardFiles, default_cache
from pipeline.data.upkeep.rewrite import RewritePlan, Rewritten, plan_rewrites, rewrite

MIN_LIVE_FRACTION = 0.5  # of a shard's bytes; below it, it is written anew
_THREADS = 4


@dataclass(frozen=True)
class CompactReport:
    """What a compaction did."""

    version: int
    num_rewritten: int  # samples that lie in another shard now
    num_shards: int  # written
    num_removed: int  # files
    removed_bytes: int
    kept: str  # the versions that can be opened


def _ignore_progress(_num_done: int, _num_to_do: int) -> None: ...


def compact(
    url: str,
    retention: Retention = DEFAULT_RETENTION,
    on_progress: Callable[[int, int], None] = _ignore_progress,
) -> CompactReport:
    """Rewrites, shrinks and removes; see the module.

    `on_progress` is told the samples rewritten and to rewrite. Raises ManifestError if there is
    no dataset, and ShardError if a sample to rewrite is damaged; then nothing was removed.
    """
    manifest = Manifest.open(url)
    plans = plan_rewrites(manifest, MIN_LIVE_FRACTION)
    num_to_do, num_done = sum(plan.samples.num_rows for plan in plans), 0
    on_progress(num_done, num_to_do)

    def list_rewritten(shards: Sequence[Rewritten]) -> None:
        nonlocal manifest
        manifest = _list(manifest, shards)

    unlisted = PendingCommits(list_rewritten)
    for rewritten in _rewritten(plans):
        num_done += rewritten.samples.num_rows
        unlisted.add(rewritten, is_last=num_done == num_to_do)
        on_progress(num_done, num_to_do)

    manifest = manifest.shrink()
    removed = _remove_unused(Manifest.open(url), retention)
    return CompactReport(
        version=manifest.version,
        num_rewritten=num_done,
        num_shards=len(plans),
        num_removed=len(removed),
        removed_bytes=sum(removed),
        kept=str(manifest.kept()),
    )


def _rewritten(plans: list[RewritePlan]) -> Iterator[Rewritten]:
    """Yields shards as they are finished, a few in the making."""
    files = ShardFiles(default_cache())
    waiting = iter(plans)
    with ThreadPoolExecutor(_THREADS) as pool:
        running: set[Future[Rewritten]] = {
            pool.submit(rewrite, plan, files) for plan in islice(waiting, _THREADS)
        }
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    running |= {pool.submit(rewrite, plan, files) for plan in islice(waiting, 1)}
                    yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _list(manifest: Manifest, rewritten: Sequence[Rewritten]) -> Manifest:
    """Lists shards; features first, so that no reader meets a sample that has lost them."""
    for extractor in sorted({name for shard in rewritten for name in shard.features}):
        rows = [shard.features[extractor] for shard in rewritten if extractor in shard.features]
        manifest.features(extractor).commit(pa.concat_tables(rows))
    return manifest.relocate(pa.concat_tables([shard.samples for shard in rewritten]))


def _remove_unused(manifest: Manifest, retention: Retention) -> list[int]:
    """Removes what no kept version lists; returns the size of each file."""
    url, since = manifest.url, retention.since()
    kept = retention.kept(manifest)
    needed = needed_by(manifest, kept)
    names = {name for _, name in needed.shards}
    locations = {shard_location(url, split, name) for split, name in needed.shards}
    for extractor in storage.list_names(storage.join(url, "features")):
        features = manifest.features(extractor)
        features.shrink(names, since)
        locations |= {sidecar_location(url, extractor, name) for name in features.shards()}

    unused = [
        location
        for folder in ("shards", "features")
        for location in _old_files(storage.join(url, folder), since)
        if location not in locations
    ]
    of_table = manifest.unused_files(needed.versions, retention.min_age_hours)
    if unused or of_table:
        manifest.drop_versions(kept, of_table)
    removed = []
    for location in unused:
        # Looked at once more: an ingest may have written the same shard again meanwhile.
        status = storage.file_status(location)
        if status is not None and status.modified < since.timestamp():
            storage.remove(location)
            removed.append(status.size_bytes)
    for extractor in manifest.extractors():
        manifest.features(extractor).remove_unused_files(retention.min_age_hours)
    remove_unused_indexes(manifest, kept, since)
    return removed


def _old_files(folder: str, since: datetime) -> Iterator[str]:
    """Yields the tars, whole or left behind half-written, in the folders of a folder."""
    for name in storage.list_names(folder):
        inner = storage.join(folder, name)
        for file, status in storage.list_files(inner).items():
            if file.endswith((".tar", ".partial")) and status.modified < since.timestamp():
                yield storage.join(inner, file)
