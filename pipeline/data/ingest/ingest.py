"""Ingest: source records become samples in listed shards, and a dataset follows its source.

The work follows what changed: records the manifest has already are left alone, without opening
an image; edited ones are written anew and supersede their old rows; vanished ones are marked
removed. A record of which only the texts changed keeps its image where it lies. A change of the
settings that images are treated by makes all of them be read again, and those of which other
bytes come out be stored again. Shards are listed in the manifest as they are finished, so that a
run that is killed keeps what it has listed and the next one does the rest. A shard that was never
listed does not exist.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from msgspec.structs import replace
from pydantic import Field

from pipeline import storage
from pipeline.config import Config
from pipeline.data.ingest.comparison import SharedKeyError
from pipeline.data.ingest.duplicates import Duplicates
from pipeline.data.ingest.filters import WANTED_REASONS, FilterConfig
from pipeline.data.ingest.image_policy import ImagePolicy
from pipeline.data.ingest.ingest_plan import (
    IngestPlan,
    ShardPlan,
    counted,
    held_by_reason,
    plan_ingest,
)
from pipeline.data.ingest.outcome import live_row, reject_row
from pipeline.data.ingest.shard_tasks import run_tasks
from pipeline.data.ingest.source_view import STAYS_AS_IT_IS, FingerprintOf, SourceView
from pipeline.data.ingest.survey import without_duplicates
from pipeline.data.ingest.unopened import find_unopened
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.pending_commits import PendingCommits
from pipeline.data.manifest.schema import SampleRow, from_table, to_table
from pipeline.data.media.image_check import BadImageError, Verify
from pipeline.data.media.reencode import ReencodeConfig
from pipeline.data.sample import Sample
from pipeline.data.sources.base import ConfiguredSource, Record, Source, SourceConfig
from pipeline.data.tars.foreign_tar import REFERENCE, ImageReference
from pipeline.data.tars.shard import Member, Shard, ShardWriter
from pipeline.digest import digest_of
from pipeline.errors import RejectError, RemovalError, SourceError
from pipeline.reason import Reason

_TOP_REASONS = 5
_EXAMPLES = 5


class IngestConfig(Config):
    """How a source becomes shards."""

    samples_per_shard: int = Field(
        default=1000, ge=1, description="samples of a shard, but for the last"
    )
    max_reject_fraction: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="stops the run when more of the listed records than this are rejected, "
        "filtered ones aside",
    )
    verify: Verify = Field(
        default="decode",
        description="`decode` decodes every new image, to find those cut short; `header` reads "
        "their sizes only",
    )
    shards_in_flight: int = Field(
        default=4, ge=0, description="Ray tasks at a time that write shards; 0: in this process"
    )
    reencode: ReencodeConfig | None = Field(
        default=None,
        description="how images are encoded anew; null: image files are stored as they came",
    )
    filters: FilterConfig = Field(default=FilterConfig(), description="which samples are left out")
    fingerprint: FingerprintOf = Field(
        default="metadata",
        description="what tells a changed image file: `metadata` its size and time, `content` "
        "its bytes",
    )
    max_removed_fraction: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="refuses a listing without more of the live samples than this share: of a "
        "source that is only half there; a single sample may always go, unless it is 0",
    )

    def image_policy(self) -> ImagePolicy:
        """Returns what image files go through."""
        return ImagePolicy(self.verify, self.reencode, self.filters)

    def check_source(self, source: SourceConfig) -> None:
        """Raises ValueError if the images of this source cannot go through that."""
        if self.reencode is not None and source.leaves_images():
            raise ValueError(STAYS_AS_IT_IS)


@dataclass(frozen=True)
class ShardEntry:
    """A written shard, not listed yet, with the manifest rows of its plan's records."""

    shard: Shard | None  # None if no record needed one
    rows: pa.Table  # schema SAMPLES


@dataclass(frozen=True)
class IngestReport:
    """What a run did, and what the dataset holds after it."""

    version: int  # of the manifest
    num_listed: int
    num_added: int
    num_edited: int
    num_removed: int
    num_unchanged: int
    num_shards: int  # written by this run
    num_live: int
    rejects: Mapping[str, int]  # all of the dataset's, by reason, the commonest first

    @property
    def num_rejects(self) -> int:
        """The records that are no samples, whatever the reason."""
        return sum(self.rejects.values())


def _ignore_progress(_num_done: int, _num_to_do: int) -> None: ...


def _is_running() -> None: ...


def ingest(
    source: Source,
    url: str,
    config: IngestConfig,
    on_progress: Callable[[int, int], None] = _ignore_progress,
    start_ray: Callable[[], None] = _is_running,
) -> IngestReport:
    """Makes the dataset at `url` hold what the source lists; see the module.

    `on_progress` is told the records written and the records to write. `start_ray` is called
    before the first Ray task, if there is any work; none is used if `config.shards_in_flight` is
    0. Raises SourceError if the source is malformed or lists nothing, RemovalError if too many
    samples would go, RejectError if too many records are rejected or no sample would be left, and
    ManifestError if another source is ingested here meanwhile; what was listed before stays.
    """
    url = storage.absolute(url)
    plan = _plan(source, Manifest.create(url), config)
    rejects = _Rejects(url, plan.num_listed, config.max_reject_fraction)
    rejects.count(plan.rejects)
    _check_removals(plan, config.max_removed_fraction)

    origin = _origin(source, config)
    manifest = plan.manifest.commit(plan.settled, origin)
    num_done, num_to_do, num_shards = 0, plan.changed.num_rows, 0

    def list_written(rows: Sequence[pa.Table]) -> None:
        nonlocal manifest
        manifest = manifest.commit(pa.concat_tables(rows), origin)

    unlisted = PendingCommits(list_written)
    on_progress(num_done, num_to_do)
    if num_to_do and config.shards_in_flight:
        start_ray()
    for entry in _written(plan, source, config):
        rejects.add(entry.rows)
        num_done += entry.rows.num_rows
        num_shards += entry.shard is not None
        unlisted.add(entry.rows, is_last=num_done == num_to_do)
        on_progress(num_done, num_to_do)
    unchanged = manifest.version == plan.manifest.version
    held = plan.held if unchanged else held_by_reason(manifest)
    counts = {row["reason"]: row["count"] for row in held.to_pylist()}
    num_live = counts.pop(None, 0)
    return IngestReport(
        version=manifest.version,
        num_listed=plan.num_listed,
        num_added=plan.num_added,
        num_edited=plan.num_edited,
        num_removed=plan.num_removed,
        num_unchanged=plan.num_unchanged,
        num_shards=num_shards,
        num_live=num_live,
        rejects=dict(Counter(counts).most_common()),
    )


def _origin(source: Source, config: IngestConfig) -> str:
    """Returns what tells this source under these settings from others, or "" if nothing does.

    The same source may be ingested twice at once: whoever comes later finds less to do.
    """
    if not isinstance(source, ConfiguredSource):
        return ""
    places = {key: storage.absolute(at) for key, at in source.config.locations().items()}
    policy = [config.image_policy().identity(), config.filters.model_dump_json()]
    settings = [source.config.model_dump_json(), places, policy, config.fingerprint]
    return digest_of(json.dumps(settings).encode())


def _plan(source: Source, manifest: Manifest, config: IngestConfig) -> IngestPlan:
    """Compares the listing with the manifest; of tars of others only what changed is opened."""
    settings = (source, config.image_policy(), config.fingerprint)
    listing = SourceView(*settings)
    unopened = find_unopened(manifest, listing.tars())
    if unopened:
        try:
            return plan_ingest(SourceView(*settings, unopened), manifest, [*unopened.values()])
        except SharedKeyError:
            pass  # all tars are opened, as in a first run
    return plan_ingest(listing, manifest)


def _check_removals(plan: IngestPlan, max_fraction: float) -> None:
    """Raises RemovalError if more samples would go than may."""
    lost = plan.lost.filter(pc.invert(pc.is_in(plan.lost["reason"], pa.array(WANTED_REASONS))))
    allowed = max(max_fraction * plan.num_live, 1 if max_fraction else 0)
    if lost.num_rows <= allowed:
        return
    counts = Counter(lost["reason"].to_pylist())
    whys = ", ".join(
        f"{count} are {f'rejected as {reason}' if reason else 'not in the source any more'}"
        for reason, count in counts.most_common(_TOP_REASONS)
    )
    keys = ", ".join(lost["key"].slice(0, _EXAMPLES).to_pylist())
    raise RemovalError(
        f"{plan.manifest.url}: {lost.num_rows} of {plan.num_live} samples would be removed, more "
        f"than max_removed_fraction={max_fraction:g} allows; nothing was changed. {whys}; for "
        f"example {keys}. Is a disk not mounted, or a list cut short? If they are to go, say "
        "--allow-removals for this once, or raise dataset.ingest.max_removed_fraction"
    )


def write_shard(plan: ShardPlan, source: Source) -> ShardEntry:
    """Writes one shard. Safe to repeat: the same images give the same bytes, the same name.

    An image that cannot be had or is not whole makes its record a reject. Raises StorageError if
    reading or writing meets a passing fault.
    """
    known = {row.key: row for row in from_table(plan.known, SampleRow)}
    rows = []
    with ShardWriter(storage.join(plan.url, "shards", plan.split)) as writer:
        for record in from_table(plan.records, Record):
            old = known.get(record.key)
            if plan.keep_images and old is not None:
                rows.append(_write_texts(writer, record, old))
            else:
                rows.append(_write_record(writer, record, old, source, plan.policy))
    shard = writer.shard if writer.num_samples else None
    if shard is not None:  # its name is the digest of the whole: known only now
        rows = [_in_shard(row, shard.name) for row in rows]
    return ShardEntry(shard, pa.concat_tables([to_table(rows, SampleRow), plan.left_out]))


_THIS_SHARD = "."  # never a shard's name


def _in_shard(row: SampleRow, name: str) -> SampleRow:
    return replace(
        row,
        shard=name if row.shard == _THIS_SHARD else row.shard,
        texts_shard=name if row.texts_shard == _THIS_SHARD else row.texts_shard,
    )


def _write_texts(writer: ShardWriter, record: Record, old: SampleRow) -> SampleRow:
    """Writes new texts for an image that stays where it is; returns the sample's row."""
    members = writer.write(Sample(record.key, {"json": record.texts.payload}))
    row = replace(
        live_row(record),
        digest=old.digest,
        shard=old.shard,
        image_offset=old.image_offset,
        image_size=old.image_size,
        width=old.width,
        height=old.height,
        source_digest=old.source_digest,
        perceptual_hash=old.perceptual_hash,
    )
    return _with_texts(row, members["json"])


def _write_record(
    writer: ShardWriter,
    record: Record,
    old: SampleRow | None,
    source: Source,
    policy: ImagePolicy,
) -> SampleRow:
    """Reads, checks and writes a record; returns its row, of a sample or of a reject."""
    try:
        payload = source.read(record)
        stored = policy.apply(payload)
    except SourceError as error:
        return reject_row(record, Reason.UNREADABLE_IMAGE, str(error))
    except BadImageError as error:
        return reject_row(record, error.reason, f"{record.image}: {error.detail}")
    row = replace(
        live_row(record),
        digest=digest_of(stored.payload),
        source_digest="" if stored.payload is payload else digest_of(payload),
        perceptual_hash=record.perceptual_hash,
        width=stored.width,
        height=stored.height,
    )
    if old is not None and _holds(old, row, record):
        return replace(
            row,
            shard=old.shard,
            image_offset=old.image_offset,
            image_size=old.image_size,
            texts_shard=old.texts_shard,
            texts_offset=old.texts_offset,
            texts_size=old.texts_size,
        )
    name, part = record.suffix, stored.payload
    if record.tar:
        name += REFERENCE
        part = ImageReference(record.image_offset, record.image_size, row.digest).to_json()
    members = writer.write(Sample(record.key, {name: part, "json": record.texts.payload}))
    place = Member(record.image_offset, record.image_size) if record.tar else members[name]
    row = replace(row, shard=_THIS_SHARD, image_offset=place.offset, image_size=place.size)
    return _with_texts(row, members["json"])


def _with_texts(row: SampleRow, member: Member) -> SampleRow:
    return replace(row, texts_shard=_THIS_SHARD, texts_offset=member.offset, texts_size=member.size)


def _holds(old: SampleRow, new: SampleRow, record: Record) -> bool:
    """Whether a live row's bytes are those of a record whose file was only touched."""
    return (
        (old.split, old.suffix, old.digest, old.texts_fingerprint)
        == (new.split, new.suffix, new.digest, new.texts_fingerprint)
        and (old.tar is None) == (new.tar is None)
        and (old.tar is None or old.image_offset == record.image_offset)
    )


def _written(plan: IngestPlan, source: Source, config: IngestConfig) -> Iterator[ShardEntry]:
    """Yields shards as they are finished, a bounded number of them in the making."""
    plans = plan.shards(config.samples_per_shard, config.image_policy())
    if config.filters.duplicates != "keep" and plan.changed.num_rows:
        duplicates = Duplicates(plan.holders(), config.filters)
        plans = without_duplicates(plans, source, duplicates, config.shards_in_flight)
    yield from run_tasks(write_shard, plans, source, config.shards_in_flight)


class _Rejects:
    """The rejects of a listing as they become known; raises RejectError once they are too many."""

    def __init__(self, url: str, num_listed: int, max_fraction: float) -> None:
        self._url = url
        self._num_listed = num_listed
        self._max_fraction = max_fraction
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, rows: pa.Table) -> None:
        """Counts those of the rows that have a reason."""
        rejects = rows.filter(pc.is_valid(rows["reason"]))
        self.count(counted(rejects))

    def count(self, rejects: pa.Table) -> None:
        """Counts rejects by reason: columns reason, count, detail."""
        for row in rejects.to_pylist():
            self._counts[row["reason"]] += row["count"]
            self._examples.setdefault(row["reason"], row["detail"])
        number = self._counts.total()
        faults = number - sum(self._counts[reason] for reason in WANTED_REASONS)
        if faults <= self._max_fraction * self._num_listed and number < self._num_listed:
            return
        allowed = (
            f"{faults} of them for faults, more than max_reject_fraction={self._max_fraction:g} "
            "allows"
            if number < self._num_listed
            else "all of them"
        )
        reasons = "\n".join(
            f"  {reason}: {count}, for example {self._examples[reason]}"
            for reason, count in self._counts.most_common(_TOP_REASONS)
        )
        raise RejectError(
            f"{self._url}: {number} of {self._num_listed} listed records are rejected, {allowed}; "
            f"the run stopped here, and what was listed before stays\n{reasons}"
        )
