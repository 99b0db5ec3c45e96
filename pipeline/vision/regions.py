"""Images to region features: the boxes a frozen detector finds, each with its box-head output."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from pipeline.config import Config
from pipeline.errors import FeatureError
from pipeline.vision import selection, weights
from pipeline.vision.arithmetic import exact_arithmetic
from pipeline.vision.detector import Detections, Detector, build, class_names
from pipeline.vision.feature import (
    Feature,
    environment,
    extractor_name,
    identity,
    part_layout,
)
from pipeline.vision.grid import NORMALIZE
from pipeline.vision.image import Prepared, ResizeWithin, describe, prepare
from pipeline.vision.packing import Storage, describe_storage, pack, packing_parts

if TYPE_CHECKING:
    from torch import Tensor

COCO_CLASSES = 91  # background and COCO's category numbers, as torchvision's detectors have them


class DetectorConfig(Config):
    """What `regions` and `segments` share: which detector, and which of its boxes.

    `min_regions: 36, max_regions: 36` gives every picture 36 regions, `10` and `100` the adaptive
    rule of bottom-up attention: those whose score is at least `score_threshold`, within these
    bounds. A picture with fewer proposals than `min_regions` has fewer regions.
    """

    weights: str = "default"  # torchvision's best for the network, a file, or `random`
    num_classes: int = Field(default=COCO_CLASSES, ge=2)  # background included
    short_side: int = Field(default=800, ge=32, le=4096)  # pixels
    long_side: int = Field(default=1333, ge=32, le=8192)  # pixels, which the longer side keeps to
    num_proposals: int = Field(default=300, ge=1, le=2000)  # boxes that the box head looks at
    nms_threshold: float = Field(default=0.3, gt=0, le=1)  # overlap at which a weaker box falls
    score_threshold: float = Field(default=0.2, ge=0, le=1)
    min_regions: int = Field(default=36, ge=1)
    max_regions: int = Field(default=36, ge=1)
    # proposal: the box that the feature is of; refined: as the box head corrects it
    boxes: Literal["proposal", "refined"] = "proposal"
    storage: Storage = "float16"

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


class RegionsConfig(DetectorConfig):
    """A torchvision Faster R-CNN. Features are its box head's output, 1024 values a region."""

    type: Literal["regions"] = "regions"
    network: str = "fasterrcnn_resnet50_fpn_v2"

    def check(self) -> None:
        """Raises ConfigError or FeatureError for what `build` would fail on, computing nothing."""
        import torch

        with torch.device("meta"):
            build("fasterrcnn", self.network, self.num_classes, self.num_proposals)
        weights.check(self.weights, self.network)

    def build(self, device: str = "cpu") -> "RegionsExtractor":
        """Loads the network, downloading `default` weights that are not in torch's cache."""
        return RegionsExtractor(self, device)


class RegionsExtractor:
    """Computes (R, D) features of regions, the highest score first.

    With them go `labels` (R,), the likeliest class from 1 on, `scores` (R,), its probability, and
    `classes` (R, C), the probabilities of all classes, 0 being background.
    """

    def __init__(self, config: RegionsConfig, device: str) -> None:
        self._config = config
        self._device = device
        self._detector = Detector(
            "fasterrcnn",
            config.network,
            config.weights,
            config.num_classes,
            config.num_proposals,
            device,
        )

    @property
    def name(self) -> str:
        return extractor_name("regions", self.card()["identity"])

    def card(self) -> dict[str, Any]:
        return detector_card(self._config, self._detector, self._detector.dim, self._device)

    def prepare(self, image: bytes) -> Prepared:
        return prepare(image, self._config.steps())

    def extract(self, prepared: Sequence[Prepared]) -> list[Feature]:
        with exact_arithmetic():
            return [self._feature(image) for image in prepared]

    def exact(self) -> Self:
        twin = copy.copy(self)
        twin._config = self._config.model_copy(update={"storage": "float32"})
        return twin

    def _feature(self, image: Prepared) -> Feature:
        found = self._detector.detect(image.pixels)
        kept = select(found, self._config)
        return region_feature(self.name, found, kept, found.values[kept], self._config)


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
    labels, _ = selection.name_regions(found.probabilities[kept])
    return found.refinements[kept, labels]


def region_feature(
    name: str, found: Detections, kept: "Tensor", values: "Tensor", config: DetectorConfig
) -> Feature:
    """Returns the values (R, D) of these proposals with boxes, labels, scores and classes."""
    probabilities = found.probabilities[kept]
    labels, scores = selection.name_regions(probabilities)
    boxes = selection.as_fractions(region_boxes(found, kept, config), *found.size)
    try:
        (packed,) = pack(values.unsqueeze(0), config.storage)
    except FeatureError as error:
        raise FeatureError(f"{name}: {error}") from error
    parts = {
        "labels": labels.int().cpu().numpy(),
        "scores": scores.cpu().numpy(),
        "classes": probabilities.half().cpu().numpy(),
    }
    return replace(packed, boxes=boxes.cpu().numpy().astype(np.float32), parts=parts)


def detector_card(
    config: "RegionsConfig | Any", detector: Detector, dim: int, device: str
) -> dict[str, Any]:
    """Returns the card of an extractor whose config is a DetectorConfig with type and network."""
    settings = config.model_dump(mode="json")
    preprocessing = [
        *describe(config.steps()),
        NORMALIZE,
        {"step": "pad right and below with zeros", "multiple": 32},
    ]
    not_selection = {"type", "weights", "short_side", "long_side", "storage"}
    rule = {
        "order": "by score, the highest first",
        "rule": "bottom-up attention",
        "batch_norm_epsilon": detector.batch_norm_epsilon,
    } | {name: value for name, value in settings.items() if name not in not_selection}
    stored = describe_storage(config.storage)
    parts = packing_parts(config.storage, dim) | {
        "labels": part_layout("int32", "R"),
        "scores": part_layout("float32", "R"),
        "classes": part_layout("float16", "R", config.num_classes),
    }
    return {
        "type": config.type,
        "identity": identity(config.type, detector.digest, preprocessing, rule, stored),
        "config": settings | {"weights": detector.weights},
        "weights": {"digest": detector.digest, "random": config.weights == "random"},
        "preprocessing": preprocessing,
        "selection": rule,
        "storage": stored,
        "dtype": stored["dtype"],
        "dim": dim,
        "num_regions": config.max_regions,
        "grid": None,
        "boxes": "stored",
        "parts": parts,
        "class_names": class_names(config.network, config.num_classes),
        "environments": [environment(device)],
    }
