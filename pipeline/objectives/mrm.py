"""Masked region modelling: hidden regions told from the others and the text."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pipeline.config import Config
from pipeline.data.load.loader import Batch
from pipeline.data.read.features import FeatureBatch
from pipeline.errors import FeatureError, ModelError
from pipeline.models.base import VisionLanguageModel
from pipeline.models.blocks import to_float
from pipeline.models.inputs import Encoded, Inputs
from pipeline.objectives.base import Encodings, Objective, ShownKind, Stream, Vocabulary, named
from pipeline.objectives.per_sample import mean_per_sample, nan_where_none

_SALT = zlib.crc32(b"mrm")
BACKGROUND = 0  # of a detector's classes
_GREY = 128  # the uint8 pixel that a model sees as (nearly) zero


class FeatureTermConfig(Config):
    """How far a predicted feature is from the true one, averaged over its values."""

    weight: float = Field(
        default=1.0, gt=0, description="factor of its loss in that of masked regions"
    )
    distance: Literal["mse", "smooth-l1"] = Field(
        default="mse", description="mse: UNITER's; smooth-l1: LXMERT's"
    )


class ClassTermConfig(Config):
    """How far predicted classes are from a detector's.

    Class 0 is background. For `label`, features with one label and score per region will do.
    """

    weight: float = Field(
        default=1.0, gt=0, description="factor of its loss in that of masked regions"
    )
    distance: Literal["kl", "label"] = Field(
        default="kl",
        description="kl: the divergence from the detector's probabilities, summed over classes "
        "(ViLBERT; UNITER averages, which is a weight of 1 / classes); label: cross-entropy "
        "with its likeliest class but background, times that class's probability (LXMERT)",
    )


class MrmConfig(Config):
    """What is hidden, and what is predicted of it; at least one of the last three.

    Of the chosen regions, those that are neither zeroed nor exchanged stay as they are.
    """

    weight: float = Field(
        default=1.0, gt=0, description="factor of its loss in the sum of the objectives'"
    )
    texts: tuple[ShownKind, ...] = Field(
        default=("captions",), min_length=1, description="the texts that are shown beside an image"
    )
    mask_fraction: float = Field(
        default=0.15, gt=0, lt=1, description="the share of regions that are chosen"
    )
    zeroed: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="the share of the chosen regions that is set to zero: ViLBERT 0.9, LXMERT "
        "0.8, UNITER all",
    )
    exchanged: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="the share of the chosen regions that becomes another region of the image: "
        "LXMERT 0.1",
    )
    features: FeatureTermConfig | None = Field(
        default=None, description="predict the features of a hidden region"
    )
    classes: ClassTermConfig | None = Field(
        default=None, description="predict a detector's object classes of a hidden region"
    )
    attributes: ClassTermConfig | None = Field(
        default=None, description="predict a detector's attribute classes of a hidden region"
    )
    matched_only: bool = Field(default=False, description="as `mlm.matched_only`")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.features is None and self.classes is None and self.attributes is None:
            raise ValueError("nothing is predicted; give features, classes or attributes")
        if self.zeroed + self.exchanged > 1:
            raise ValueError(f"zeroed={self.zeroed} and exchanged={self.exchanged} exceed 1")
        return self

    def build(self) -> "list[MaskedRegionModelling]":
        return [MaskedRegionModelling(self, kind) for kind in dict.fromkeys(self.texts)]


@dataclass(frozen=True)
class Labels:
    """One class for each of N regions, and how sure of it the detector was."""

    label: Tensor  # (N,) int64
    confidence: Tensor  # (N,) float32, from 0 to 1

    def __getitem__(self, regions: Tensor) -> "Labels":
        return Labels(self.label[regions], self.confidence[regions])


@dataclass(frozen=True)
class RegionTarget:
    """What N chosen regions of B samples were: F feature values, C classes, A attributes."""

    chosen: Tensor  # (B, R) bool; the rows of the others follow its True values
    features: Tensor | None  # (N, F) as stored
    classes: Tensor | Labels | None  # (N, C) probabilities, or the likeliest
    attributes: Tensor | Labels | None  # (N, A) probabilities, or the likeliest

    def select(self, samples: Tensor) -> "RegionTarget":
        """Returns the target of these samples."""
        numbers = torch.zeros(self.chosen.shape, dtype=torch.long)
        numbers[self.chosen] = torch.arange(int(self.chosen.sum()))
        chosen = self.chosen[samples]
        regions = numbers[samples][chosen]
        return RegionTarget(
            chosen,
            features=None if self.features is None else self.features[regions],
            classes=None if self.classes is None else self.classes[regions],
            attributes=None if self.attributes is None else self.attributes[regions],
        )


@dataclass(frozen=True)
class RegionCorruption:
    """What becomes of B samples' regions."""

    chosen: npt.NDArray[np.bool_]  # (B, R): predicted
    zeroed: npt.NDArray[np.bool_]  # (B, R)
    source: npt.NDArray[np.int64]  # (B, R): which region of the image is shown instead


class MaskedRegionModelling(Objective):
    """ViLBERT (arXiv:1908.02265, 3.1), LXMERT (1908.07490, 3.1.2), UNITER (1909.11740, 3.2).

    At least one region of an image is chosen, as in UNITER. Only chosen regions are predicted, as
    in VOLTA (arXiv:2011.15124), while LXMERT's code predicts the classes of all. A region is
    exchanged for another of its own image, not of any image, so that a sample does not depend on
    others. Neighbours that overlap a hidden region stay, as in ViLBERT's code.
    """

    metric_name = "similarity"
    needs_regions = True

    def __init__(self, config: MrmConfig, kind: ShownKind = "captions") -> None:
        super().__init__(config.weight)
        self.config = config
        self.name = named("mrm", kind)
        self.stream = Stream(kind, "full")
        self.matched_only = config.matched_only

    def draw(self, batch: Batch) -> RegionCorruption:
        """Returns what becomes of each region: a function of seed, step and position."""
        features = _features(batch)
        shape = features.values.shape[:2]
        chosen, zeroed = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
        source = np.tile(np.arange(shape[1]), (shape[0], 1))
        for i, count in enumerate(features.num_regions.tolist()):
            if not count:
                continue
            rng = batch.rng(i, _SALT)
            is_chosen = rng.random(count) < self.config.mask_fraction
            if not is_chosen.any():
                is_chosen[rng.integers(count)] = True
            draws, others = rng.random(count), rng.integers(count, size=count)
            is_zeroed = draws < self.config.zeroed
            is_exchanged = ~is_zeroed & (draws < self.config.zeroed + self.config.exchanged)
            chosen[i, :count] = is_chosen
            zeroed[i, :count] = is_chosen & is_zeroed
            source[i, :count] = np.where(is_chosen & is_exchanged, others, source[i, :count])
        return RegionCorruption(chosen, zeroed, source)

    def prepare(
        self,
        batch: Batch,
        encodings: Encodings,
        vocabulary: Vocabulary,  # noqa: ARG002
        drawn: RegionCorruption,
    ) -> tuple[Encodings, RegionTarget]:
        """Raises FeatureError if the features do not tell what is to be predicted."""
        config, features, chosen = self.config, _features(batch), drawn.chosen
        known, classes = None, None
        if features.labels is not None:
            known = _labels(features.labels, features.scores, chosen)
        if config.classes is not None:
            classes = _verdict("classes", config.classes, features.classes, known, chosen)
        attributes = None
        if config.attributes is not None:
            attributes = _verdict(
                "attributes", config.attributes, features.attributes, None, chosen
            )
        target = RegionTarget(
            chosen=torch.from_numpy(chosen),
            features=torch.from_numpy(features.values[chosen]) if config.features else None,
            classes=classes,
            attributes=attributes,
        )
        return encodings, target

    def select(
        self,
        target: RegionTarget,
        samples: Tensor,
        num_tokens: int,  # noqa: ARG002
    ) -> RegionTarget:
        return target.select(samples)

    def hide(self, batch: Batch, inputs: Inputs, drawn: RegionCorruption) -> Inputs:
        values = _features(batch).values
        rows = np.arange(len(values))[:, None]
        values = values[rows, drawn.source]  # a copy
        values[drawn.zeroed] = _GREY if values.dtype == np.uint8 else 0
        return Inputs(
            tokens=inputs.tokens,
            token_padding=inputs.token_padding,
            features=torch.from_numpy(values),
            boxes=inputs.boxes,
            region_padding=inputs.region_padding,
            masked_regions=torch.from_numpy(drawn.zeroed),
        )

    def loss(
        self,
        model: VisionLanguageModel,
        encoded: Encoded,
        inputs: Inputs,  # noqa: ARG002
        target: RegionTarget,
    ) -> Tensor:
        predictions = model.region_predictions(encoded.regions[target.chosen])
        total = torch.zeros(len(target.chosen), device=target.chosen.device)
        for weight, distance, predicted, true in self._terms(predictions, target):
            total = total + weight * mean_per_sample(distance(predicted, true), target.chosen)
        return total

    def metric(
        self,
        model: VisionLanguageModel,
        encoded: Encoded,
        inputs: Inputs,  # noqa: ARG002
        target: RegionTarget,
    ) -> Tensor:
        """Cosine between what was predicted and what was there, features or probabilities."""
        predictions = model.region_predictions(encoded.regions[target.chosen])
        _, distance, predicted, true = self._terms(predictions, target)[0]
        if distance not in (_mse, _smooth_l1):
            predicted = predicted.softmax(-1)
        if isinstance(true, Labels):
            true = F.one_hot(true.label, predicted.shape[-1]).float()
        cosine = F.cosine_similarity(predicted, true, dim=-1)
        return nan_where_none(mean_per_sample(cosine, target.chosen), target.chosen)

    def _terms(
        self, predictions: dict[str, Tensor], target: RegionTarget
    ) -> "list[tuple[float, Distance, Tensor, Tensor | Labels]]":
        """Returns weight, distance, prediction and truth (N, ...), float32, of what is asked for.

        Raises ModelError if the family does not predict it, or not of this size.
        """
        config = self.config
        terms: list[tuple[float, Distance, Tensor, Tensor | Labels]] = []
        for name, head, term, true in (
            ("features", "features", config.features, target.features),
            ("classes", "objects", config.classes, target.classes),
            ("attributes", "attributes", config.attributes, target.attributes),
        ):
            if term is None or true is None:
                continue
            if head not in predictions:
                raise ModelError(
                    f"objectives.mrm.{name}: this family does not predict it; it predicts "
                    f"{', '.join(predictions)}"
                )
            predicted = predictions[head].float()
            if isinstance(true, Labels):
                size = int(true.label.max()) + 1 if len(true.label) else 0
                fits = size <= predicted.shape[-1]
            else:
                true = to_float(true).float()
                size, fits = true.shape[-1], predicted.shape == true.shape
            if not fits:
                raise ModelError(
                    f"objectives.mrm.{name}: the model predicts {predicted.shape[-1]}, the "
                    f"features have {size}; set model.sizes accordingly"
                )
            terms.append((term.weight, _DISTANCES[term.distance], predicted, true))
        return terms


def _verdict(
    name: str,
    term: ClassTermConfig,
    probabilities: npt.NDArray[np.generic] | None,
    labels: Labels | None,
    chosen: npt.NDArray[np.bool_],
) -> Tensor | Labels:
    """Returns what a detector took the chosen regions for, as the term's distance wants it.

    Raises FeatureError if the features do not say.
    """
    if probabilities is None and (labels is None or term.distance == "kl"):
        raise FeatureError(
            f"objectives.mrm.{name}: these features have no {name}; leave it out, or use an "
            "extractor that is a detector"
            + ("" if labels is None else "; they have labels, for distance: label")
        )
    if probabilities is None:
        assert labels is not None
        return labels
    known = torch.from_numpy(probabilities[chosen])
    if term.distance == "kl":
        return known
    if name == "classes":  # what a region is can be unsure, but it is never nothing
        known = known.clone()
        known[..., BACKGROUND] = -1
    confidence, label = known.max(-1)
    return Labels(label, confidence.float())


def _labels(
    labels: npt.NDArray[np.int32],
    scores: npt.NDArray[np.float32] | None,
    chosen: npt.NDArray[np.bool_],
) -> Labels:
    """Reads a detector's labels; one that gives no scores is sure of each."""
    label = torch.from_numpy(labels[chosen].astype(np.int64))
    sure = torch.ones(len(label)) if scores is None else torch.from_numpy(scores[chosen]).float()
    return Labels(label, sure)


Distance = Callable[[Tensor, Any], Tensor]  # prediction and truth (N, ...) to (N,)


def _mse(predicted: Tensor, true: Tensor) -> Tensor:
    return F.mse_loss(predicted, true, reduction="none").mean(-1)


def _smooth_l1(predicted: Tensor, true: Tensor) -> Tensor:
    return F.smooth_l1_loss(predicted, true, reduction="none").mean(-1)


def _kl(logits: Tensor, probabilities: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(-1), probabilities, reduction="none").sum(-1)


def _label(logits: Tensor, true: Labels) -> Tensor:
    return true.confidence * F.cross_entropy(logits, true.label, reduction="none")


_DISTANCES: dict[str, Distance] = {
    "mse": _mse,
    "smooth-l1": _smooth_l1,
    "kl": _kl,
    "label": _label,
}


def _features(batch: Batch) -> FeatureBatch:
    if batch.features is None:
        raise FeatureError("objectives.mrm: this batch has no features")
    return batch.features
