"""The storage dtype of features: float32, float16, or int8 with scales."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from pipeline.data.read.extractor_card import PartLayout, StorageLoss
from pipeline.errors import FeatureError
from pipeline.vision.feature import Feature, Projection, Quantized

if TYPE_CHECKING:
    from torch import Tensor

# float32 is for comparison, and for published features that are to be kept to the last bit. A scale
# for each region is smaller in error than one for each channel where some regions are much weaker
# than others (convolutions behind a ReLU), and the other way round where a few channels are huge in
# every region (vision transformers).
Storage = Literal["float32", "float16", "int8", "int8-per-channel"]

_LEVELS = 127  # int8 from -127 to 127, so that 0 is stored as 0


def describe_storage(storage: Storage) -> dict[str, Any]:
    """Returns the rule as the card lists it, and the identity is taken from it."""
    if storage == "int8":
        return {"dtype": "int8", "scale": "per region, its largest size / 127"}
    if storage == "int8-per-channel":
        return {"dtype": "int8", "scale": "per image and channel, its largest size / 127"}
    return {"dtype": storage}


def storage_parts(storage: Storage, dim: int) -> dict[str, PartLayout]:
    """Returns what is stored beside D = `dim` values of each region, as the card lists it."""
    if storage == "int8":
        return {"scales": PartLayout.of("float32", "R", 1)}
    if storage == "int8-per-channel":
        return {"scales": PartLayout.of("float32", 1, dim)}
    return {}


def to_storage(values: "Tensor", storage: Storage) -> list[Feature]:
    """Maps float32 values (B, R, D), on any device, to B features without boxes.

    Raises FeatureError if a value does not fit: not finite, or beyond float16's 65,504.
    """
    import torch

    if storage in ("float16", "float32"):
        stored = values.to(getattr(torch, storage))
        _check_finite(stored, values, storage)
        return [Feature(array, boxes=None) for array in stored.cpu().numpy()]
    _check_finite(values, values, storage)
    largest = values.abs().amax(dim=2 if storage == "int8" else 1, keepdim=True)
    scales = largest / _LEVELS  # (B, R, 1) or (B, 1, D)
    levels = (values / scales.clamp_min(torch.finfo(torch.float32).tiny)).round_()
    integers = levels.clamp_(-_LEVELS, _LEVELS).to(torch.int8)
    converted = zip(integers.cpu().numpy(), scales.cpu().numpy(), strict=True)
    return [_restored(Quantized(*pair)) for pair in converted]


def image_to_storage(values: npt.NDArray[np.float32], storage: Storage) -> Feature:
    """Maps the values (R, D) of one image to its feature without boxes."""
    import torch

    (converted,) = to_storage(torch.from_numpy(np.ascontiguousarray(values)).unsqueeze(0), storage)
    return converted


def _restored(quantized: Quantized) -> Feature:
    return Feature(quantized.restore(), boxes=None, quantized=quantized)


def _check_finite(stored: "Tensor", values: "Tensor", storage: Storage) -> None:
    import torch

    if not bool(torch.isfinite(stored).all()):
        raise FeatureError(
            f"values up to {float(values.abs().max()):.3g} do not fit {storage}; choose another "
            "layer, or weights that belong to this network"
        )


def compare_storage(
    exact: Sequence[Feature], projections: Mapping[str, Projection]
) -> dict[str, StorageLoss]:
    """Returns size and error of every form that float32 features could be stored in.

    Forms with all their dimensions come first, then those that `projections` bring them to, which
    are called by their names here.
    """
    found = {}
    for name, projection in [("", None), *projections.items()]:
        for storage in get_args(Storage):
            stored = []
            for feature in exact:
                values = projection.project(feature.values) if projection else feature.values
                converted = image_to_storage(values, storage)
                stored.append(
                    replace(
                        feature,
                        values=converted.values,
                        quantized=converted.quantized,
                        projection=projection,
                    )
                )
            found[f"{name} {storage}".strip()] = measure_storage_loss(exact, stored)
    return found


def measure_storage_loss(exact: Sequence[Feature], stored: Sequence[Feature]) -> StorageLoss:
    """Compares what was stored of some images with the float32 values, as the card states it."""
    a, b = (
        np.concatenate([feature.as_computed().astype(np.float64) for feature in features])
        for features in (exact, stored)
    )
    length = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = (a * b).sum(axis=1)[length > 0] / length[length > 0]
    return StorageLoss(
        images=len(exact),
        relative_rms=float(np.sqrt(((a - b) ** 2).sum() / max((a**2).sum(), 1e-300))),
        cosine=float(cosines.mean()) if len(cosines) else 1.0,
        bytes_per_image=round(sum(feature.size_bytes for feature in stored) / len(stored)),
    )
