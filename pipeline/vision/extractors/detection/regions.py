"""Region features: the boxes a frozen detector finds, each with its box-head output."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from pipeline.data.read.extractor_card import (
    ExtractionEnvironment,
    ExtractorCard,
    PartLayout,
    Weights,
    identity,
)
from pipeline.errors import FeatureError
from pipeline.vision.compress.storage_dtype import (
    Storage,
    describe_storage,
    storage_parts,
    to_storage,
)
from pipeline.vision.extractors import weights
from pipeline.vision.extractors.arithmetic import exact_arithmetic
from pipeline.vision.extractors.detection import selection
from pipeline.vision.extractors.detection.detector import (
    Detections,
    Detector,
    Loaded,
    build,
    class_names,
)
from pipeline.vision.extractors.grid import NORMALIZE
from pipeline.vision.extractors.network import NetworkConfig
from pipeline.vision.feature import Feature
from pipeline.vision.preprocess.image import Prepared, ResizeWithin, describe, prepare

if TYPE_CHECKING:
    from torch import Tensor

COCO_CLASSES = 91  # background and COCO's category numbers, as torchvision's detectors have them


class DetectorConfig(NetworkConfig):
    """What `regions` and `segments` share: which detector, and which of its boxes.

    `min_regions: 36, max_regions: 36` gives every picture 36 regions, `10` and `100` the adaptive
    rule of bottom-up attention: those whose score is at least `score_threshold`, within these
    bounds. A picture with fewer proposals than `min_regions` has fewer regions.
    """

    kind: ClassVar[str]  # torchvision's, fasterrcnn or maskrcnn
    type: str = Field(description="the extractor")
    network: str = Field(description="the detector's name in torchvision")
    weights: str = Field(
        default="default",
        description="torchvision's best for the network (`default`), a file, or `random`",
    )
    num_classes: int = Field(
        default=COCO_CLASSES, ge=2, description="classes of the weights, background included"
    )
    short_side: int = Field(
        default=800, ge=32, le=4096, description="pixels that the shorter side is scaled to"
    )
    long_side: int = Field(
        default=1333, ge=32, le=8192, description="pixels that the longer side keeps to"
    )
    num_proposals: int = Field(
        default=300, ge=1, le=2000, description="boxes that the box head looks at"
    )
    nms_threshold: float = Field(
        default=0.3, gt=0, le=1, description="overlap at which a weaker box falls"
    )
    score_threshold: float = Field(
        default=0.2, ge=0, le=1, description="score of a box beyond `min_regions`"
    )
    min_regions: int = Field(
        default=36, ge=1, description="fewest regions of a picture, if it has as many proposals"
    )
    max_regions: int = Field(default=36, ge=1, description="most regions of a picture")
    boxes: Literal["proposal", "refined"] = Field(
        default="proposal",
        description="proposal: the box that the feature is of; refined: as the box head "
        "corrects it",
    )

    @model_validator(mode="after")
    def _bounds_fit(self) -> Self:
        if not self.min_regions <= self.max_regions <= self.num_proposals:
            raise ValueError(
                f"min_regions={self.min_regions} <= max_regions={self.max_regions} <= "
                f"num_proposals={self.num_proposals} does not hold"
            )
        if self.short_side > self.long_side:
            raise ValueError(f"short_side={self.short_side} is over long_side={self.long_side}")
        return self

    def steps(self) -> tuple[ResizeWithin]:
        """What happens to the pixels before they are normalized."""
        return (ResizeWithin(self.short_side, self.long_side),)

    def selection(self) -> dict[str, Any]:
        """Returns all that decides which regions a picture has, and of what their features are.

        A threshold that cannot change anything is not part of it.
        """
        elsewhere = {*NetworkConfig.model_fields, "type", "weights", "short_side", "long_side"}
        if self.min_regions == self.max_regions:
            elsewhere.add("score_threshold")
        return self.model_dump(mode="json", exclude=elsewhere)

    def check(self) -> None:
        import torch

        super().check()
        with torch.device("meta"):
            build(self.kind, self.network, self.num_classes, self.num_proposals)
        weights.check(self.weights, self.network)


class RegionsConfig(DetectorConfig):
    """A torchvision Faster R-CNN. Features are its box head's output, 1024 values a region."""

    kind = "fasterrcnn"
    type: Literal["regions"] = Field(
        default="regions",
        description="a torchvision Faster R-CNN: its box head's output, 1024 values a region",
    )
    network: str = Field(
        default="fasterrcnn_resnet50_fpn_v2", description="the detector's name in torchvision"
    )

    def load(self, device: str) -> "RegionsExtractor":
        return RegionsExtractor(self, device)


class DetectorExtractor(ABC):
    """Computes (R, D) features of regions, the highest score first.

    With them go `labels` (R,), the likeliest class from 1 on, `scores` (R,), its probability, and
    `classes` (R, C), the probabilities of all classes, 0 being background.
    """

    def __init__(self, config: DetectorConfig, device: str) -> None:
        self._storage = config.storage
        self._window = config.window
        self._device = device
        self.steps = config.steps()
        self.detector = Detector(
            config.kind,
            config.network,
            config.weights,
            config.num_classes,
            config.num_proposals,
            device,
        )

    @property
    def name(self) -> str:
        return self.card().name

    @abstractmethod
    def card(self) -> ExtractorCard:
        """What made the features."""

    @abstractmethod
    def _feature(self, loaded: Loaded) -> Feature:
        """Returns the feature of one picture."""

    def prepare(self, image: bytes) -> Prepared:
        return prepare(image, self.steps, self._window)

    def load(self, prepared: Sequence[Prepared]) -> list[Loaded]:
        """Returns the pictures as the network takes them, one by one."""
        return [self.detector.load(image.pixels) for image in prepared]

    def forward(self, loaded: Sequence[Loaded]) -> list[Detections]:
        """Runs the network alone."""
        return [self.detector.detect(image) for image in loaded]

    def extract(self, prepared: Sequence[Prepared]) -> list[Feature]:
        with exact_arithmetic():
            try:
                return [self._feature(self.detector.load(image.pixels)) for image in prepared]
            except FeatureError as error:
                raise FeatureError(f"{self.name}: {error}") from error

    def exact(self) -> Self:
        twin = copy.copy(self)
        twin._storage = "float32"
        return twin

    def _card(self, config: DetectorConfig, dim: int) -> ExtractorCard:
        """Returns the card for features of `dim` values."""
        preprocessing = (
            *describe(self.steps, config.window),
            NORMALIZE,
            {"step": "pad right and below with zeros", "multiple": 32},
        )
        rule = {
            "order": "by score, the highest first",
            "rule": "bottom-up attention",
            "batch_norm_epsilon": self.detector.batch_norm_epsilon,
        } | config.selection()
        stored = describe_storage(config.storage)
        digest = self.detector.digest
        parts = storage_parts(config.storage, dim) | {
            "labels": PartLayout.of("int32", "R"),
            "scores": PartLayout.of("float32", "R"),
            "classes": PartLayout.of("float16", "R", config.num_classes),
        }
        return ExtractorCard(
            type=config.type,
            identity=identity(config.type, digest, preprocessing, rule, stored),
            config=config.model_dump(mode="json") | {"weights": self.detector.weights},
            weights=Weights(digest=digest, random=config.weights == "random"),
            preprocessing=preprocessing,
            selection=rule,
            storage=stored,
            dtype=stored["dtype"],
            dim=dim,
            num_regions=config.max_regions,
            grid=None,
            boxes="stored",
            parts=parts,
            class_names=class_names(config.network, config.num_classes),
            environments=(ExtractionEnvironment.here(self._device),),
        )


class RegionsExtractor(DetectorExtractor):
    """Regions whose features are the box head's output."""

    def __init__(self, config: RegionsConfig, device: str) -> None:
        super().__init__(config, device)
        self._config = config

    def card(self) -> ExtractorCard:
        return self._card(self._config, self.detector.dim)

    def _feature(self, loaded: Loaded) -> Feature:
        found = self.detector.detect(loaded)
        kept = select(found, self._config)
        boxes = region_boxes(found, kept, self._config)
        return region_feature(found, kept, found.values[kept], boxes, self._storage)


def select(found: Detections, config: DetectorConfig) -> "Tensor":
    """Returns the indices of a picture's regions among its proposals, the best first."""
    survived = selection.survivors(found.boxes, found.probabilities, config.nms_threshold)
    confidence = selection.confidences(found.probabilities, survived)
    return selection.choose(
        confidence, config.score_threshold, config.min_regions, config.max_regions
    )


def region_boxes(found: Detections, kept: "Tensor", config: DetectorConfig) -> "Tensor":
    """Returns the boxes (R, 4) of these proposals in pixels."""
    if config.boxes == "proposal":
        return found.boxes[kept]
    labels, _ = selection.likeliest_classes(found.probabilities[kept])
    return found.refinements[kept, labels]


def region_feature(
    found: Detections, kept: "Tensor", values: "Tensor", boxes: "Tensor", storage: Storage
) -> Feature:
    """Returns the values (R, D) and boxes (R, 4) of these proposals with labels and classes."""
    probabilities = found.probabilities[kept]
    labels, scores = selection.likeliest_classes(probabilities)
    (converted,) = to_storage(values.unsqueeze(0), storage)
    parts = {
        "labels": labels.int().cpu().numpy(),
        "scores": scores.cpu().numpy(),
        "classes": probabilities.half().cpu().numpy(),
    }
    fractions = selection.as_fractions(boxes, *found.size).cpu().numpy().astype(np.float32)
    return replace(converted, boxes=fractions, parts=parts)
