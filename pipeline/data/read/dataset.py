"""One version of a dataset, whose every sample is read by position."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import storage
from pipeline.data.manifest.content import kept_content
from pipeline.data.manifest.index import Index
from pipeline.data.manifest.index_build import open_index, remake_index
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.read.features import FeatureBatch as FeatureBatch
from pipeline.data.read.features import FeatureReader, open_features
from pipeline.data.read.images import ImageReader, LiveConfig, LiveReader
from pipeline.data.read.rows import DatasetFiles, Located, Rows, ShardTotals, SplitRows
from pipeline.data.sample import TextKind as TextKind
from pipeline.data.sample import Texts
from pipeline.data.tars.members import Int64Array, Members
from pipeline.data.tars.shard_files import CACHE_SIZE_BYTES, ShardFiles, default_cache
from pipeline.errors import FeatureError, ManifestError, ShardError


class Dataset:
    """One version of a dataset, read-only."""

    def __init__(self, manifest: Manifest, files: ShardFiles, cache: Path) -> None:
        self.url = manifest.url
        self.version = manifest.version
        self._manifest = manifest
        self._files = files
        self._cache = cache

    @classmethod
    def open(
        cls,
        url: str,
        version: int | None = None,
        cache: Path | None = None,
        cache_size_bytes: int = CACHE_SIZE_BYTES,
    ) -> "Dataset":
        """Opens a version, or the newest; raises ManifestError if there is none.

        Shards of an object store are copied into the folder `cache` when they are first read;
        its default is the environment's SIGHTLINE_CACHE, else ~/.cache/sightline.
        """
        cache = cache or default_cache()
        files = ShardFiles(cache, cache_size_bytes)
        return cls(Manifest.open(url, version), files, cache)

    def splits(self) -> list[str]:
        """Returns the names of the splits that have live samples, sorted."""
        return [*self.split_sizes()]

    def split_sizes(self) -> dict[str, int]:
        """Returns the number of live samples of each split that has some, by name."""
        return self._index(None).split_sizes()

    def content(self, split: str | None = None) -> str:
        """Returns a digest of what there is to learn from: of a split's live samples, or of all.

        Two versions have the same if they have the same keys, splits, images to the byte, and
        texts. Where samples lie is no part of it, so that `compact` does not change it, but does
        change the order of training: a run that goes on needs its version.
        """
        return kept_content(self._manifest, split, self._index(None).folder)

    def split(self, name: str, features: str | LiveConfig | None = None) -> "Split":
        """Opens a split, with the features of an extractor if its folder is named.

        A LiveConfig gives features that are made of the images as they are read, none stored.
        Samples of whose image the extractor could make nothing are passed over; the split says how
        many. Raises ManifestError if the split has no live sample, and FeatureError if some of its
        samples lack these features.
        """
        extractor = features if isinstance(features, str) else None
        index = self._index(extractor)
        rows = SplitRows(index, name, partial(remake_index, self._manifest, extractor, self._cache))
        num_samples = index.split_sizes().get(name, 0)
        if not num_samples:
            raise ManifestError(
                f"{self.url}: split {name!r} has no live sample in version {self.version}; "
                f"splits that have some: {', '.join(index.split_sizes()) or 'none'}"
            )
        reader = None
        if extractor is not None:
            self._check_listed(extractor, name, rows, num_samples)
            reader = open_features(self.url, extractor, rows, self._files)
        live = features if isinstance(features, LiveConfig) else None
        return Split(
            self.url, name, rows, DatasetFiles(self.url, index), self._files, reader or live
        )

    def _index(self, extractor: str | None) -> Index:
        return open_index(self._manifest, extractor, self._cache)

    def _check_listed(self, extractor: str, split: str, rows: SplitRows, num_samples: int) -> None:
        """Raises FeatureError if nothing is listed of some samples, or no feature of any."""
        if rows.num_missing:
            raise FeatureError(
                f"{self.url}: {rows.num_missing} of the {num_samples} live samples of "
                f"split {split!r} have no features of {extractor!r}, {rows.first_missing!r} the "
                "first of them; run `sightline extract RECIPE`"
            )
        if not rows.num_rows:
            raise FeatureError(
                f"{self.url}: {extractor!r} could make nothing of any of the {num_samples} images "
                f"of split {split!r}; `sightline data rejects` lists them with the reasons"
            )


class Split:
    """The live samples of a split. Rows are numbered shard by shard, in the order they lie in.

    Any number of threads may read at once. A read raises ShardError, naming the file and the
    sample, if the bytes are not all there.
    """

    def __init__(
        self,
        url: str,
        name: str,
        rows: SplitRows,
        located_in: DatasetFiles,
        files: ShardFiles,
        features: FeatureReader | LiveConfig | None,
    ) -> None:
        self.url = url
        self.name = name
        self.num_samples = rows.num_rows
        self.num_rejects = rows.num_rejects  # further live samples, of which are no features
        self.num_shards = rows.num_shards
        # (num_shards + 1,): the first row of each shard and, last, the number of rows.
        self.shard_starts = rows.starts
        # Whether all it reads is on this machine.
        self.is_local = storage.is_local(url) and located_in.tars_are_local
        self._rows = rows
        self._members = Members(files, located_in.location)
        self._features: FeatureReader | LiveReader | None
        if isinstance(features, LiveConfig):
            self._features = LiveReader(ImageReader(self._members), features)
        else:
            self._features = features

    @property
    def has_features(self) -> bool:
        """Whether the split was opened with an extractor's features, or with live ones."""
        return self._features is not None

    @property
    def is_augmented(self) -> bool:
        """Whether its features vary, as far as all that was written about an image allows it."""
        return isinstance(self._features, LiveReader) and self._features.is_augmented

    def without_features(self) -> "Split":
        """Returns the same rows, whose pictures are not looked at."""
        twin = copy.copy(self)
        twin._features = None
        return twin

    def totals(self, kind: TextKind) -> ShardTotals:
        """Returns what each shard has of captions, questions or dialog rounds."""
        return self._rows.totals(kind)

    def counts(self, kind: TextKind, shard: int) -> npt.NDArray[np.int32]:
        """Returns how many captions, questions or dialog rounds each row of a shard has."""
        return self._rows.counts(kind, shard)

    def num_texts(self, kind: TextKind) -> int:
        """Returns how many captions, questions or dialog rounds all rows have."""
        return int(self._rows.totals(kind).num_texts.sum())

    def keys(self, rows: Rows) -> list[str]:
        """Returns the keys of the samples of these rows."""
        keys: list[str] = self._rows.located(rows).keys.tolist()
        return keys

    def each_key(self) -> Iterator[str]:
        """Yields the keys of all rows, a shard at a time."""
        for shard in range(self.num_shards):
            yield from self._rows.of_shard(shard).keys

    def read(
        self,
        rows: Rows,
        kind: TextKind | None = None,
        rng: Callable[[int], np.random.Generator] | None = None,
    ) -> "Reading":
        """Reads all that a batch has of these rows: as `keys`, `texts` and `features` do."""
        located = self._rows.located(rows)
        texts = self._texts(located, kind)
        features = self._read_features(located, texts, rng) if self.has_features else None
        return Reading(located.keys.tolist(), texts, features)

    def texts(self, rows: Rows, kind: TextKind | None = None) -> list[Texts]:
        """Reads what people wrote about the images of these rows, or of that only one kind."""
        return self._texts(self._rows.located(rows), kind)

    def _texts(self, located: Located, kind: TextKind | None) -> list[Texts]:
        places = located.places("texts")
        payloads = self._members.read(places)
        texts: list[Texts] = []
        try:
            texts += map(Texts.from_json, payloads, repeat(kind))
        except ShardError as error:
            raise ShardError(f"{self._members.where(places, len(texts))}: {error}") from error
        return texts

    def fetch(self, shards: Int64Array) -> None:
        """Brings what a loader reads of these shards into the cache, if they are far away.

        `shards` are numbered as in `shard_starts`. Raises ShardError if a file is not there.
        """
        for shard in shards.tolist():
            located = self._rows.of_shard(shard)
            self._members.fetch(located.places("texts"))
            if self._features is not None:
                self._features.fetch(located)

    def image(self, row: int) -> bytes:
        """Reads the image file of a row, as it is stored."""
        (payload,) = self._members.read(self._rows.located([row]).places("image"))
        return payload

    def features(
        self,
        rows: Rows,
        texts: Sequence[Texts] = (),
        rng: Callable[[int], np.random.Generator] | None = None,
    ) -> FeatureBatch:
        """Reads the features of these rows, padded to the most regions among them.

        Live ones, if augmented, are each varied by random numbers of `rng(i)`, as far as `texts[i]`
        allow it; stored ones are what they are. Raises FeatureError if the split was opened without
        features, or a sidecar holds other arrays than the manifest says.
        """
        return self._read_features(self._rows.located(rows), texts, rng)

    def _read_features(
        self,
        located: Located,
        texts: Sequence[Texts],
        rng: Callable[[int], np.random.Generator] | None,
    ) -> FeatureBatch:
        if self._features is None:
            raise FeatureError(
                f"{self.url}: split {self.name!r} was opened without features; "
                "name an extractor's folder when opening it"
            )
        if isinstance(self._features, LiveReader):
            return self._features.read(located, texts, rng)
        return self._features.read(located)

    def masks(self, row: int) -> list[dict[str, Any]] | None:
        """Reads the outlines of a row's regions: COCO's run-length codes, or None without any."""
        return None if self._features is None else self._features.masks(self._rows.located([row]))


@dataclass(frozen=True)
class Reading:
    """What was read of B rows of a split."""

    keys: list[str]
    texts: list[Texts]
    features: FeatureBatch | None  # None if the split was opened without
