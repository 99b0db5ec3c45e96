"""Version retention: which shards must stay for the versions that are kept."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import State
from pipeline.data.manifest.versions import Kept
from pipeline.errors import ManifestError

ShardId = tuple[str, str]  # split and name


@dataclass(frozen=True)
class Retention:
    """Which versions of a dataset, and which unlisted files, outlive a compaction.

    Everything that was current or written within `min_age_hours` stays: an ingest or a reader
    that began then goes on undisturbed. It must be longer than they take.
    """

    last_versions: int = 10
    versions: frozenset[int] = frozenset()  # named ones: those that runs have read
    min_age_hours: int = 24

    def since(self) -> datetime:
        """The time from which on everything stays."""
        return datetime.now(UTC) - timedelta(hours=self.min_age_hours)

    def kept(self, manifest: Manifest) -> Kept:
        """Returns the versions to keep. Named ones that were dropped earlier stay dropped."""
        since = self.since()
        current = max((v.version for v in manifest.versions() if v.time <= since), default=0)
        first = max(min(current, manifest.version - self.last_versions + 1), 0)
        known = manifest.kept()
        first = max(first, known.first)
        return Kept(first, frozenset(v for v in self.versions if v < first and v in known))


DEFAULT_RETENTION = Retention()


@dataclass(frozen=True)
class Needed:
    """What the kept versions of a dataset list."""

    shards: frozenset[ShardId]
    # Together these have every file of the manifest's table that the kept versions read.
    versions: frozenset[int]


def needed_by(manifest: Manifest, kept: Kept) -> Needed:
    """Returns the shards that any kept version lists, images' and texts'.

    Versions that only add rows are read together: from the first of them all rows that held, and
    all rows that came later.
    """
    ends = [v.version - 1 for v in manifest.versions() if v.replaced and v.version > kept.first]
    ends.append(manifest.version)
    shards: set[ShardId] = set()
    for version in (kept.first, *kept.named):
        shards |= _shards(Manifest.open(manifest.url, version).samples(_COLUMNS))
    for end in ends:
        shards |= _shards(Manifest.open(manifest.url, end).rows_after(kept.first, _COLUMNS))
    return Needed(frozenset(shards), frozenset({kept.first, *kept.named, *ends}))


def versions_of_run(run: str, dataset: str) -> frozenset[int]:
    """Returns the versions of a dataset that a run has read; raises ManifestError if none."""
    location = storage.join(run, "environment.json")
    try:
        found = json.loads(storage.read_bytes(location)).get("versions", {})
    except (ValueError, AttributeError) as error:
        raise ManifestError(f"{location}: not a JSON object ({error})") from error
    dataset = storage.absolute(dataset)
    if dataset not in found:
        others = f"; it has read {', '.join(found)}" if found else ""
        raise ManifestError(f"{location}: the run has read nothing of {dataset}{others}")
    return frozenset(found[dataset])


_COLUMNS = ("split", "state", "shard", "texts_shard")


def _shards(rows: pa.Table) -> set[ShardId]:
    rows = rows.filter(pc.equal(rows["state"], State.LIVE))
    found: set[ShardId] = set()
    for column in ("shard", "texts_shard"):
        pairs = rows.group_by(["split", column]).aggregate([])
        found |= set(zip(pairs["split"].to_pylist(), pairs[column].to_pylist(), strict=True))
    return found
