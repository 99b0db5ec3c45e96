"""Manifest to samples: opens one version of a dataset, whose every sample is read by position."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline.data.features import FeatureBatch as FeatureBatch
from pipeline.data.features import FeatureReader, open_features
from pipeline.data.images import ImageBatch, ImageConfig, ImageReader
from pipeline.data.manifest import Manifest
from pipeline.data.members import Int64Array, Members, sorted_codes
from pipeline.data.sample import Texts
from pipeline.data.shard import shard_location
from pipeline.data.shard_files import CACHE_SIZE_BYTES, ShardFiles, default_cache
from pipeline.errors import FeatureError, ManifestError, ShardError

TextKind = Literal["captions", "questions", "rounds"]
Rows = Sequence[int] | Int64Array

_COLUMNS = (
    "key",
    "split",
    "shard",
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

    def content(self, split: str | None = None) -> str:
        """Returns a digest of what there is to learn from: of a split's live samples, or of all.

        Two versions have the same if they have the same keys, splits, images to the byte, and
        texts. Where samples lie is no part of it, so that `compact` does not change it, but does
        change the order of training: a run that goes on needs its version. Of a source whose
        fingerprints do not tell texts from images, an image's new date counts as new texts.
        """
        samples = self._manifest.samples(("key", "split", "digest", "fingerprint"))
        if split is not None:
            samples = samples.filter(pc.equal(samples["split"], split))
        samples = samples.sort_by("key")
        texts = pc.replace_substring_regex(samples["fingerprint"], "^[^-]*-", "")
        lines = pc.binary_join_element_wise(
            samples["key"], samples["split"], samples["digest"], texts, "\n", "\t"
        )
        digest = xxhash.xxh3_128()
        for start in range(0, len(lines), _KEYS_AT_ONCE):
            digest.update("".join(lines.slice(start, _KEYS_AT_ONCE).to_pylist()).encode())
        return digest.hexdigest()

    def split(self, name: str, features: str | None = None) -> "Split":
        """Opens a split, with the features of an extractor if its folder is named.

        Raises ManifestError if the split has no live sample, and FeatureError if some of its
        samples lack these features.
        """
        samples = self._manifest.samples(_COLUMNS)
        in_split = pc.equal(samples["split"], name)
        for column in ("shard", "texts_shard"):  # numbers are filtered and sorted faster than names
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
        keys = _strings(samples["key"])
        reader = None
        if features is not None:
            reader = open_features(self._manifest, features, name, samples, keys, self._files)
        return Split(self.url, name, samples, keys, self._files, reader)


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
        features: FeatureReader | None,
    ) -> None:
        self.url = url
        self.name = name
        self.num_samples: int = samples.num_rows
        self.keys = keys  # (num_samples,) numpy strings: an item is a str
        self._samples = samples.select(["num_captions", "num_questions", "num_rounds"])
        self._features = features

        def members(part: str, shard: str) -> Members:
            names, shard_of_row = sorted_codes(samples[shard])
            return Members(
                files,
                [shard_location(url, name, shard) for shard in names],
                shard_of_row,
                samples[f"{part}_offset"].to_numpy(),
                samples[f"{part}_size"].to_numpy(),
                keys,
            )

        self._images = members("image", "shard")
        self._pictures = ImageReader(self._images)
        self._texts = members("texts", "texts_shard")
        _, shard_of_row = sorted_codes(samples["shard"])
        # (num_shards + 1,): the first row of each shard and, last, the number of rows.
        self.shard_starts = np.searchsorted(shard_of_row, np.arange(shard_of_row[-1] + 2))

    @property
    def urls(self) -> tuple[str, ...]:
        """Where its dataset lies; a mixture of splits has several."""
        return (self.url,)

    @property
    def has_features(self) -> bool:
        """Whether the split was opened with an extractor's features."""
        return self._features is not None

    def counts(self, kind: TextKind) -> npt.NDArray[np.int32]:
        """Returns how many captions, questions or dialog rounds each row has."""
        counts: npt.NDArray[np.int32] = self._samples[f"num_{kind}"].to_numpy()
        return counts

    def texts(self, rows: Rows) -> list[Texts]:
        """Reads what people wrote about the images of these rows."""
        rows = _array(rows)
        texts = []
        for row, payload in zip(rows.tolist(), self._texts.read(rows), strict=True):
            try:
                texts.append(Texts.from_json(payload))
            except ShardError as error:
                raise ShardError(
                    f"{self._texts.location(row)}: sample {self.keys[row]!r}: {error}"
                ) from error
        return texts

    def fetch(self, shards: Int64Array, with_images: bool) -> None:
        """Brings what a loader reads of these shards into the cache, if they are far away.

        `shards` are numbered as in `shard_starts`. Raises ShardError if a file is not there.
        """
        for shard in shards.tolist():
            rows = np.arange(self.shard_starts[shard], self.shard_starts[shard + 1])
            self._texts.fetch(rows)
            if self._features is not None:
                self._features.fetch(rows)
            if with_images:
                self._images.fetch(rows)

    def image(self, row: int) -> bytes:
        """Reads the image file of a row, as it is stored."""
        return self._images.read(_array([row]))[0]

    def images(
        self,
        rows: Rows,
        config: ImageConfig,
        texts: Sequence[Texts] = (),
        rng: Callable[[int], np.random.Generator] | None = None,
    ) -> ImageBatch:
        """Decodes the images of these rows and scales them to one size.

        With `config.augment` each is varied by random numbers of `rng(i)`, as far as `texts[i]`
        allow it.
        """
        return self._pictures.read(_array(rows), config, texts, rng)

    def features(self, rows: Rows) -> FeatureBatch:
        """Reads the features of these rows, padded to the most regions among them.

        Raises FeatureError if the split was opened without features, or a sidecar holds other
        arrays than the manifest says.
        """
        if self._features is None:
            raise FeatureError(
                f"{self.url}: split {self.name!r} was opened without features; "
                "name an extractor's folder when opening it"
            )
        return self._features.read(_array(rows))

    def masks(self, row: int) -> list[dict[str, Any]] | None:
        """Reads the outlines of a row's regions: COCO's run-length codes, or None without any."""
        return None if self._features is None else self._features.masks(row)


def _array(rows: Rows) -> Int64Array:
    return np.asarray(rows, np.int64)


def _strings(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Returns numpy strings of variable length: a few bytes a row, where a str takes 70."""
    strings = np.empty(len(column), np.dtypes.StringDType())
    for start in range(0, len(column), _KEYS_AT_ONCE):
        strings[start : start + _KEYS_AT_ONCE] = column.slice(start, _KEYS_AT_ONCE).to_pylist()
    return strings
