"""Principal components: features in fewer dimensions, fitted on a sample of images.

The components are fitted once and kept in a file of their own. Its digest is part of the
extractor's identity, so that a feature stays a function of the image and the extractor.
"""

import contextlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import Field

from pipeline import storage
from pipeline.config import Config
from pipeline.data.read.dataset import Dataset
from pipeline.data.read.extractor_card import ExtractorCard, Fitted, Reduction, wrapped_identity
from pipeline.digest import digest_of_parts
from pipeline.errors import ConfigError, FeatureError
from pipeline.vision.compress.storage_dtype import (
    Storage,
    describe_storage,
    image_to_storage,
    storage_parts,
)
from pipeline.vision.extractor import Extractor
from pipeline.vision.feature import Feature, Projection
from pipeline.vision.preprocess.image import Prepared

FITTED_BATCH = 8  # images computed at once while fitting
SAMPLE = "the live samples whose keys have the lowest xxh3 hashes"


class PcaConfig(Config):
    """To how many dimensions values are brought, and where the matrix is that does it."""

    dims: int = Field(ge=1, description="values that a region is brought to")
    matrix: str = Field(
        pattern=r"\.safetensors$",
        description="a .safetensors file; `sightline extract` fits it if there is none, and "
        "from then on it stays",
    )
    images: int = Field(default=256, ge=1, description="images of the sample that it is fitted on")


class ReducedExtractor:
    """Another extractor's features, their values (R, D) brought to (R, K)."""

    def __init__(self, extractor: Extractor, config: PcaConfig, stored: Storage) -> None:
        self._exact = extractor.exact()
        self._extractor = extractor
        self._config = config
        self._storage = stored
        self._projection, self._fitted = load(config.matrix)
        dim = extractor.card().dim
        if self._projection.components.shape != (config.dims, dim):
            raise FeatureError(
                f"{config.matrix}: is a matrix for {self._projection.components.shape[1]} values "
                f"and {len(self._projection.components)} dimensions; the extractor gives {dim}, "
                f"and extractor.pca.dims is {config.dims}; give another file"
            )

    @property
    def name(self) -> str:
        return self.card().name

    def card(self) -> ExtractorCard:
        card = self._extractor.card()
        dims, matrix = self._config.dims, storage.absolute(self._config.matrix)
        rule_digest = digest(self._projection)
        rule = {"dims": dims, "digest": rule_digest}
        config = self._config.model_copy(update={"matrix": matrix}).model_dump(mode="json")
        parts = {name: part for name, part in card.parts.items() if name != "scales"}
        return card.model_copy(
            update={
                "identity": wrapped_identity(card.identity, "pca", rule),
                "config": card.config | {"pca": config},
                "pca": Reduction(
                    dims=dims,
                    digest=rule_digest,
                    matrix=matrix,
                    **self._fitted.model_dump(),
                ),
                "storage": describe_storage(self._storage),
                "dim": dims,
                "parts": storage_parts(self._storage, dims) | parts,
            }
        )

    def prepare(self, image: bytes) -> Prepared:
        return self._extractor.prepare(image)

    def extract(self, prepared: Sequence[Prepared]) -> list[Feature]:
        return [self._reduce(feature) for feature in self._exact.extract(prepared)]

    def exact(self) -> Extractor:
        return self._exact  # of all dimensions: what is lost of them is error too

    def _reduce(self, feature: Feature) -> Feature:
        converted = image_to_storage(self._projection.project(feature.values), self._storage)
        return replace(
            feature,
            values=converted.values,
            quantized=converted.quantized,
            projection=self._projection,
        )


def fit(features: Iterable[npt.NDArray[Any]], dims: int) -> tuple[Projection, Fitted]:
    """Returns the `dims` directions in which rows (R, D) vary most, and what the card says of it.

    Each component points to where its largest weight is positive. Raises ConfigError if there are
    fewer values or rows than dimensions.
    """
    count, images = 0, 0
    total = products = np.zeros(())
    for values in features:
        rows = values.astype(np.float64)
        count, images = count + len(rows), images + 1
        total, products = total + rows.sum(axis=0), products + rows.T @ rows
    if dims > min(count - 1, total.size):
        raise ConfigError(
            f"extractor.pca.dims={dims}: cannot be had of {count} vectors of {total.size} values; "
            "lower it, or raise extractor.pca.images"
        )
    mean = total / count
    variances, vectors = np.linalg.eigh(products / count - np.outer(mean, mean))
    components = vectors[:, ::-1][:, :dims].T
    largest = np.abs(components).argmax(axis=1)[:, None]
    components = components * np.sign(np.take_along_axis(components, largest, axis=1))
    kept = variances[::-1][:dims].sum() / max(variances.sum(), 1e-300)
    fitted = Fitted(images=images, vectors=count, sample=SAMPLE, variance_kept=float(kept))
    return Projection(mean.astype(np.float32), components.astype(np.float32)), fitted


def fit_to(url: str, extractor: Extractor, config: PcaConfig) -> None:
    """Fits a matrix for an extractor to a sample of a dataset's images, and writes it."""
    values = _values(extractor.exact(), sample_images(url, config.images))
    save(config.matrix, *fit(values, config.dims))


def sample_images(url: str, count: int) -> Iterator[bytes]:
    """Yields the image files of the sample; the same for the same samples, however sharded."""
    dataset = Dataset.open(url)
    splits = [dataset.split(name) for name in dataset.splits()]
    hashed = (
        (xxhash.xxh3_64_intdigest(key.encode()), number, row)
        for number, split in enumerate(splits)
        for row, key in enumerate(split.each_key())
    )
    for _, number, row in heapq.nsmallest(count, hashed):
        yield splits[number].image(row)


def save(location: str, projection: Projection, fitted: Fitted) -> None:
    """Writes the matrix with what it was fitted on."""
    from safetensors.numpy import save as to_bytes

    tensors = {"mean": projection.mean, "components": np.ascontiguousarray(projection.components)}
    storage.write_bytes(location, to_bytes(tensors, {"fitted": fitted.model_dump_json()}))


def load(location: str) -> tuple[Projection, Fitted]:
    """Reads what `save` wrote, or raises FeatureError."""
    import json

    import safetensors
    from safetensors.numpy import load as from_bytes

    if not storage.exists(location):
        raise FeatureError(
            f"extractor.pca.matrix: no such file: {storage.absolute(location)}; "
            "`sightline extract RECIPE` fits it"
        )
    payload = storage.read_bytes(location)
    try:
        tensors = from_bytes(payload)
        header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
        fitted = Fitted.model_validate_json(header["__metadata__"]["fitted"])
        return Projection(tensors["mean"], tensors["components"]), fitted
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise FeatureError(
            f"{location}: expected a matrix that `sightline extract` has fitted ({error!r}); "
            "move it away, or give another file"
        ) from error


def digest(projection: Projection) -> str:
    """Returns the hash of the matrix that goes into the identity."""
    return digest_of_parts(
        part
        for array in (projection.mean, projection.components)
        for part in (f"{array.shape}".encode(), np.ascontiguousarray(array).tobytes())
    )


def _values(exact: Extractor, images: Iterable[bytes]) -> Iterator[npt.NDArray[Any]]:
    batch: list[Prepared] = []
    for image in images:
        with contextlib.suppress(FeatureError):  # `extract` lists it as a reject
            batch.append(exact.prepare(image))
        if len(batch) == FITTED_BATCH:
            yield from (feature.values for feature in exact.extract(batch))
            batch = []
    if batch:
        yield from (feature.values for feature in exact.extract(batch))
