"""One version of a dataset, whose every sample is read by position."""

import copy
from collections.abc import Callable, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline import storage
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import foreign_tars
from pipeline.data.read.features import FeatureBatch as FeatureBatch
from pipeline.data.read.features import FeatureReader, listed_features, open_features
from pipeline.data.read.images import ImageReader, LiveConfig, LiveReader
from pipeline.data.sample import TextKind as TextKind
from pipeline.data.sample import Texts
from pipeline.data.tars.foreign_tar import Location
from pipeline.data.tars.members import Int64Array, Members, sorted_codes
from pipeline.data.tars.shard import shard_location
from pipeline.data.tars.shard_files import CACHE_SIZE_BYTES, ShardFiles, default_cache
from pipeline.errors import FeatureError, ManifestError, ShardError

Rows = Sequence[int] | Int64Array

_COLUMNS = (
    "key",
    "split",
    "shard",
    "tar",
    "image_offset",
    "image_size",
    "texts_shard",
    "texts_offset",
    "texts_size",
    "num_captions",
    "num_questions",
    "num_rounds",
)
_KEYS_AT_ONCE = 100_000


class Dataset:
    """One version of a dataset, read-only."""

    def __init__(self, manifest: Manifest, files: ShardFiles) -> None:
        self.url = manifest.url
        self.version = manifest.version
        self._manifest = manifest
        self._files = files

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
        files = ShardFiles(cache or default_cache(), cache_size_bytes)
        return cls(Manifest.open(url, version), files)

    def splits(self) -> list[str]:
        """Returns the names of the splits that have live samples, sorted."""
        return sorted(self._manifest.samples(["split"])["split"].unique().to_pylist())

    def split_sizes(self) -> dict[str, int]:
        """Returns the number of live samples of each split that has some, by name."""
        counted = self._manifest.samples(["split"])["split"].value_counts().to_pylist()
        sizes = {entry["values"]: entry["counts"] for entry in counted}
        return {name: sizes[name] for name in sorted(sizes)}

    def content(self, split: str | None = None) -> str:
        """Returns a digest of what there is to learn from: of a split's live samples, or of all.

        Two versions have the same if they have the same keys, splits, images to the byte, and
        texts. Where samples lie is no part of it, so that `compact` does not change it, but does
        change the order of training: a run that goes on needs its version.
        """
        samples = self._manifest.samples(("key", "split", "digest", "texts_fingerprint"))
        if split is not None:
            samples = samples.filter(pc.equal(samples["split"], split))
        samples = samples.sort_by("key")
        lines = pc.binary_join_element_wise(
            samples["key"],
            samples["split"],
            samples["digest"],
            samples["texts_fingerprint"],
            "\n",
            "\t",
        )
        digest = xxhash.xxh3_128()
        for start in range(0, len(lines), _KEYS_AT_ONCE):
            digest.update("".join(lines.slice(start, _KEYS_AT_ONCE).to_pylist()).encode())
        return digest.hexdigest()

    def split(self, name: str, features: str | LiveConfig | None = None) -> "Split":
        """Opens a split, with the features of an extractor if its folder is named.

        A LiveConfig gives features that are made of the images as they are read, none stored.
        Samples of whose image the extractor could make nothing are passed over; the split says how
        many. Raises ManifestError if the split has no live sample, and FeatureError if some of its
        samples lack these features.
        """
        samples = self._manifest.samples(_COLUMNS)
        in_split = pc.equal(samples["split"], name)
        for column in ("shard", "texts_shard"):  # numbers are filtered and sorted faster
            index = samples.column_names.index(column)
            samples = samples.set_column(index, column, samples[column].dictionary_encode())
        samples = samples.drop_columns("split").filter(in_split)
        if not samples.num_rows:
            raise ManifestError(
                f"{self.url}: split {name!r} has no live sample in version {self.version}; "
                f"splits that have some: {', '.join(self.splits()) or 'none'}"
            )
        _, shard_of_row = sorted_codes(samples["shard"])
        samples = samples.take(np.lexsort((samples["image_offset"].to_numpy(), shard_of_row)))
        if not isinstance(features, str):
            keys = _strings(samples["key"])
            return Split(self.url, name, samples, keys, self._files, features)
        listed = listed_features(self._manifest, features, name, samples)
        usable = pc.is_null(listed["reason"])
        num_rejects = listed.num_rows - listed["reason"].null_count
        samples, listed = samples.filter(usable), listed.filter(usable)
        keys = _strings(samples["key"])
        reader = open_features(self._manifest, features, listed, keys, self._files)
        return Split(self.url, name, samples, keys, self._files, reader, num_rejects)


class Split:
    """The live samples of a split. Rows are numbered shard by shard, in the order they lie in.

    Any number of threads may read at once. A read raises ShardError, naming the file and the
    sample, if the bytes are not all there.
    """

    def __init__(
        self,
        url: str,
        name: str,
        samples: pa.Table,
        keys: npt.NDArray[Any],
        files: ShardFiles,
        features: FeatureReader | LiveConfig | None,
        num_rejects: int = 0,
    ) -> None:
        self.url = url
        self.name = name
        self.num_samples: int = samples.num_rows
        self.num_rejects = num_rejects  # further live samples, of which there are no features
        self.keys = keys  # (num_samples,) numpy strings: an item is a str
        self._samples = samples.select(["num_captions", "num_questions", "num_rounds"])

        def members(part: str, locations: Sequence[Location], of_row: Int64Array) -> Members:
            return Members(
                files,
                locations,
                of_row,
                samples[f"{part}_offset"].to_numpy(),
                samples[f"{part}_size"].to_numpy(),
                keys,
            )

        self._images = members("image", *_image_files(url, name, samples))
        self._features: FeatureReader | LiveReader | None
        if isinstance(features, LiveConfig):
            self._features = LiveReader(ImageReader(self._images), features)
        else:
            self._features = features
        shards, shard_of_row = sorted_codes(samples["texts_shard"])
        locations = [shard_location(url, name, shard) for shard in shards]
        self._texts = members("texts", locations, shard_of_row)
        _, shard_of_row = sorted_codes(samples["shard"])
        # (num_shards + 1,): the first row of each shard and, last, the number of rows.
        self.shard_starts = np.searchsorted(shard_of_row, np.arange(shard_of_row[-1] + 2))

    @property
    def is_local(self) -> bool:
        """Whether all it reads is on this machine."""
        return storage.is_local(self.url) and self._images.are_local

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

    def counts(self, kind: TextKind) -> npt.NDArray[np.int32]:
        """Returns how many captions, questions or dialog rounds each row has."""
        counts: npt.NDArray[np.int32] = self._samples[f"num_{kind}"].to_numpy()
        return counts

    def texts(self, rows: Rows, kind: TextKind | None = None) -> list[Texts]:
        """Reads what people wrote about the images of these rows, or of that only one kind."""
        rows = _array(rows)
        payloads = self._texts.read(rows)
        texts: list[Texts] = []
        try:
            texts += map(Texts.from_json, payloads, repeat(kind))
        except ShardError as error:
            row = int(rows[len(texts)])
            raise ShardError(
                f"{self._texts.location(row)}: sample {self.keys[row]!r}: {error}"
            ) from error
        return texts

    def fetch(self, shards: Int64Array) -> None:
        """Brings what a loader reads of these shards into the cache, if they are far away.

        `shards` are numbered as in `shard_starts`. Raises ShardError if a file is not there.
        """
        for shard in shards.tolist():
            rows = np.arange(self.shard_starts[shard], self.shard_starts[shard + 1])
            self._texts.fetch(rows)
            if self._features is not None:
                self._features.fetch(rows)

    def image(self, row: int) -> bytes:
        """Reads the image file of a row, as it is stored."""
        return self._images.read(_array([row]))[0]

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
        if self._features is None:
            raise FeatureError(
                f"{self.url}: split {self.name!r} was opened without features; "
                "name an extractor's folder when opening it"
            )
        if isinstance(self._features, LiveReader):
            return self._features.read(_array(rows), texts, rng)
        return self._features.read(_array(rows))

    def masks(self, row: int) -> list[dict[str, Any]] | None:
        """Reads the outlines of a row's regions: COCO's run-length codes, or None without any."""
        return None if self._features is None else self._features.masks(row)


def _image_files(url: str, split: str, samples: pa.Table) -> tuple[Sequence[Location], Int64Array]:
    """Returns the files that hold images, and for each row which of them holds its."""
    shards, file_of_row = sorted_codes(samples["shard"])
    tars, tar_of_row = foreign_tars(samples["tar"])
    left = tar_of_row >= 0
    file_of_row[left] = len(shards) + tar_of_row[left]
    locations = [shard_location(url, split, shard) for shard in shards]
    return [*locations, *tars], file_of_row


def _array(rows: Rows) -> Int64Array:
    return np.asarray(rows, np.int64)


def _strings(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Returns numpy strings of variable length: a few bytes a row, where a str takes 70."""
    strings = np.empty(len(column), np.dtypes.StringDType())
    for start in range(0, len(column), _KEYS_AT_ONCE):
        strings[start : start + _KEYS_AT_ONCE] = column.slice(start, _KEYS_AT_ONCE).to_pylist()
    return strings
