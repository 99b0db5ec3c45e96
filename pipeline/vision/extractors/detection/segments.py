"""Segment features: the regions of Mask R-CNN, each with its outline."""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from pipeline.data.read.extractor_card import ExtractorCard
from pipeline.vision.extractors.detection import selection
from pipeline.vision.extractors.detection.detector import Detections, Loaded
from pipeline.vision.extractors.detection.regions import (
    DetectorConfig,
    DetectorExtractor,
    region_boxes,
    region_feature,
    select,
)
from pipeline.vision.feature import Feature, Mask

if TYPE_CHECKING:
    from torch import Tensor

MASK_LEVELS = 256  # channels of the pyramid, of which a mask-pooled feature is the mean


class SegmentsConfig(DetectorConfig):
    """A torchvision Mask R-CNN.

    A feature is the box head's output (1024 values), the mean of the feature pyramid over the
    mask (256), or one after the other.
    """

    kind = "maskrcnn"
    type: Literal["segments"] = Field(
        default="segments",
        description="a torchvision Mask R-CNN: regions with the masks of their objects",
    )
    network: str = Field(
        default="maskrcnn_resnet50_fpn_v2", description="the detector's name in torchvision"
    )
    boxes: Literal["proposal", "refined"] = Field(
        default="refined",
        description="proposal: the box that the feature is of; refined: as the box head "
        "corrects it, and the mask head was trained",
    )
    pool: Literal["box", "mask", "both"] = Field(
        default="both",
        description="box: the box head's output (1024 values); mask: the mean of the feature "
        "pyramid over the mask (256); both: one after the other",
    )
    mask_side: int = Field(
        default=512, ge=16, le=4096, description="pixels of the longer side of the masks"
    )

    def load(self, device: str) -> "SegmentsExtractor":
        return SegmentsExtractor(self, device)


class SegmentsExtractor(DetectorExtractor):
    """Regions with a mask for each, whose features are of the box, the mask, or both."""

    def __init__(self, config: SegmentsConfig, device: str) -> None:
        super().__init__(config, device)
        self._config = config

    def card(self) -> ExtractorCard:
        parts = {"box": self.detector.dim, "mask": MASK_LEVELS}
        dim = parts.get(self._config.pool, sum(parts.values()))
        card = self._card(self._config, dim)
        return card.model_copy(update={"segments": "COCO run-length code"})

    def _feature(self, loaded: Loaded) -> Feature:
        import torch

        found = self.detector.detect(loaded)
        kept = select(found, self._config)
        boxes = region_boxes(found, kept, self._config)
        maps, masks = self._masks(found, kept, boxes)
        values = {"box": found.values[kept], "mask": mask_pooled(maps, masks)}
        chosen = values.get(self._config.pool)
        if chosen is None:
            chosen = torch.cat(list(values.values()), dim=1)
        feature = region_feature(found, kept, chosen, boxes, self._storage)
        return replace(
            feature, masks=run_length_masks(masks, boxes, found.size, self._config.mask_side)
        )

    def _masks(
        self, found: Detections, kept: "Tensor", boxes: "Tensor"
    ) -> tuple["Tensor", "Tensor"]:
        """Returns the pyramid within each box (R, 256, H, W), and its masks (R, 1, 2H, 2W)."""
        heads = self.detector.model.roi_heads
        maps = heads.mask_roi_pool(found.pyramid, [boxes], [found.padded_size])
        logits = heads.mask_predictor(heads.mask_head(maps))  # (R, C, 2H, 2W)
        labels, _ = selection.likeliest_classes(found.probabilities[kept])
        return maps, logits[range(len(labels)), labels].sigmoid().unsqueeze(1)


def mask_pooled(maps: "Tensor", masks: "Tensor") -> "Tensor":
    """Returns the mean (R, C) of maps (R, C, H, W), weighted by masks (R, 1, 2H, 2W) in [0, 1]."""
    import torch

    shares = torch.nn.functional.avg_pool2d(masks, 2)
    total = shares.sum(dim=(2, 3)).clamp_min(torch.finfo(torch.float32).tiny)
    return (maps * shares).sum(dim=(2, 3)) / total


def run_length_masks(
    masks: "Tensor", boxes: "Tensor", size: tuple[int, int], side: int
) -> tuple[Mask, ...]:
    """Returns the masks (R, 1, H, W) of boxes (R, 4) over the whole picture, cut at one half.

    The picture's size, in the pixels of the boxes, is scaled so that its longer side is `side`.
    """
    from pycocotools.mask import encode
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    if not len(masks):
        return ()
    height, width = (max(1, round(length * side / max(size))) for length in size)
    scale = boxes.new_tensor([width / size[1], height / size[0]] * 2)
    raster = paste_masks_in_image(masks, boxes * scale, (height, width)) >= 0.5  # (R, 1, H, W)
    bits = np.asfortranarray(raster[:, 0].permute(1, 2, 0).cpu().numpy().astype(np.uint8))
    return tuple(Mask(height, width, found["counts"].decode()) for found in encode(bits))
