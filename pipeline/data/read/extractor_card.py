"""The card of an extractor: what made the features that lie beside it.

`features/<extractor>/card.json` is one, and so is what a trained model's folder says of what it
sees by. The extractor writes it, `sightline extract` adds what it measured, and the readers of
sidecars take from it what the manifest does not list.
"""

import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, ValidationError, model_serializer, model_validator

from pipeline import storage
from pipeline.config import Config
from pipeline.data.media.augmentation import AugmentConfig
from pipeline.digest import digest_of
from pipeline.errors import FeatureError

FILE = "card.json"
VERSION = 1  # of the form; a card that says none is of the first
LIBRARIES = ("numpy", "pillow", "simplejpeg", "torch", "torchvision")


class _Record(Config):
    """A part of the card. As plain data it lacks what is None unless somebody says otherwise.

    Keys that nobody here knows are kept: what others note on a card stays when it is written anew.
    """

    model_config = ConfigDict(extra="allow")

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        fields = type(self).model_fields
        return {
            name: value
            for name, value in serialize(self).items()
            if value is not None or name not in fields or fields[name].is_required()
        }


class PartLayout(_Record):
    """The type and shape of an array that a sidecar has of each sample."""

    dtype: str
    shape: tuple[int | Literal["R"], ...]  # R: as many as the sample has regions

    @classmethod
    def of(cls, dtype: str, *shape: int | Literal["R"]) -> Self:
        return cls(dtype=dtype, shape=shape)

    @property
    def axes(self) -> str:
        """The shape as messages have it."""
        return f"({', '.join(map(str, self.shape))})"

    def counts(self, num_regions: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Returns the length of the first axis for every sample."""
        first = self.shape[0]
        return num_regions if first == "R" else np.full_like(num_regions, first)


class Weights(_Record):
    """The weights of a network, wherever they lay."""

    digest: str
    random: bool = False
    trained: bool = False  # in the model, from these on


class Fitted(_Record):
    """What principal components were fitted on, and how much of it they keep."""

    images: int
    vectors: int
    sample: str
    variance_kept: float  # of 1


class Reduction(Fitted):
    """The principal components that values were brought to."""

    dims: int
    digest: str  # of the matrix
    matrix: str  # its file


class LivePictures(_Record):
    """How pictures vary that are made features of for each batch."""

    augment: AugmentConfig | None


class BatchInvariance(_Record):
    """How far features moved with the batch they were computed in."""

    images: int
    largest_difference: float
    tolerance: float
    measure: str


class StorageLoss(_Record):
    """How far what is stored lies from the float32 values, and how large it is.

    `relative_rms` is that of the error over that of the values; `cosine` the mean over regions.
    """

    images: int
    relative_rms: float
    cosine: float
    bytes_per_image: int


class ExtractionEnvironment(_Record):
    """What may move the last digit of a feature, and what was measured there."""

    device: str
    libraries: dict[str, str]  # versions
    batch_invariance: BatchInvariance | None = None
    storage_error: StorageLoss | None = None

    @classmethod
    def here(cls, device: str, *more_libraries: str) -> Self:
        """Returns that of this process, of which nothing is measured yet."""
        names = (*LIBRARIES, *more_libraries)
        return cls(
            device=device, libraries={name: importlib.metadata.version(name) for name in names}
        )

    def is_at(self, other: "ExtractionEnvironment") -> bool:
        """Whether both are of one device with the same libraries."""
        return (self.device, self.libraries) == (other.device, other.libraries)


class ExtractorCard(_Record):
    """What made features, and what each sample has of them.

    `config` are the extractor's settings, from which it is built again. `preprocessing`,
    `selection` and `storage` say in full what its identity is a hash of.
    """

    version: int = VERSION
    type: str
    identity: str
    config: dict[str, Any]
    weights: Weights | None  # None: there are none, or they are not ours
    preprocessing: tuple[dict[str, Any], ...] = ()
    selection: dict[str, Any] = Field(default={})
    storage: dict[str, Any] = Field(default={})
    dtype: str | None = None  # of the values; None: whatever they are
    dim: int  # values of a region
    num_regions: int | None = None  # of an image, or the most of them
    grid: tuple[int, int] | None  # rows and columns, if the regions are a grid's cells
    frame_grid: tuple[int, int] | None = None  # those of a video's frame
    boxes: Literal["grid", "stored"]  # whether they follow from the grid
    parts: dict[str, PartLayout] = Field(default={})  # arrays beside values and boxes
    class_names: tuple[str, ...] | None = None  # of labels, from 0, which is background
    segments: str | None = None  # the code of the masks, if there are some
    pca: Reduction | None = None
    live: LivePictures | None = None  # None: features are stored
    environments: tuple[ExtractionEnvironment, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _of_a_known_form(cls, document: Any) -> Any:
        version = document.get("version", VERSION) if isinstance(document, Mapping) else VERSION
        if isinstance(version, int) and version > VERSION:
            raise ValueError(
                f"a later release wrote it, in form {version}, and this one reads forms up to "
                f"{VERSION}; use that release, or a newer one"
            )
        return document

    @classmethod
    def parse(cls, document: Any, where: str) -> Self:
        """Reads plain data, or raises FeatureError that begins with `where`."""
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            fault = error.errors()[0]
            key = ".".join(map(str, fault["loc"]))
            said = " ".join(fault["msg"].removeprefix("Value error, ").split())[:200]
            raise FeatureError(
                f"{where}: not the card of an extractor: {key}{': ' if key else ''}{said}"
            ) from None

    @property
    def name(self) -> str:
        """The folder under `features/`: the type and the beginning of the identity."""
        return extractor_name(self.type, self.identity)

    def plain(self) -> dict[str, Any]:
        """Returns what `parse` reads."""
        return self.model_dump(mode="json")


def extractor_name(kind: str, identity: str) -> str:
    """Returns the folder name of an extractor."""
    return f"{kind}-{identity[:8]}"


def identity(
    kind: str,
    weights_digest: str | None,
    preprocessing: Sequence[Mapping[str, Any]],
    selection: Mapping[str, Any],
    storage: Mapping[str, Any],
) -> str:
    """Returns the hash of all that a feature depends on besides its image.

    Where the weights lay, the batch size, the device and the versions of libraries are not in
    it: the card records them, and features agree across them up to rounding.
    """
    parts = {
        "type": kind,
        "weights": weights_digest,
        "preprocessing": list(preprocessing),
        "selection": dict(selection),
        "storage": dict(storage),
    }
    return digest_of(json.dumps(parts, sort_keys=True).encode())


def wrapped_identity(inner: str, kind: str, rule: Mapping[str, Any]) -> str:
    """Returns the hash of an extractor that does more to another one's features, by a rule."""
    parts = {"of": inner, kind: dict(rule)}
    return digest_of(json.dumps(parts, sort_keys=True).encode())


def card_location(url: str, extractor: str) -> str:
    """Returns where a dataset has the card of an extractor."""
    return storage.join(url, "features", extractor, FILE)


def read_card(url: str, extractor: str) -> ExtractorCard | None:
    """Returns the card of a dataset's features, None if there is none; FeatureError if damaged."""
    location = card_location(url, extractor)
    if not storage.exists(location):
        return None
    try:
        document = json.loads(storage.read_bytes(location))
    except ValueError as error:
        raise FeatureError(f"{location}: damaged: not JSON: {error}") from error
    return ExtractorCard.parse(document, location)


def write_card(url: str, card: ExtractorCard) -> None:
    """Writes the card beside the features, which are found by its name."""
    document = json.dumps(card.plain(), indent=2).encode() + b"\n"
    storage.write_bytes(card_location(url, card.name), document)
