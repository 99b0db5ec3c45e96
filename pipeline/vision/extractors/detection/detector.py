"""The torchvision R-CNN detector: proposals with features and class probabilities."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.media.image_pixels import Pixels
from pipeline.errors import ConfigError
from pipeline.vision.extractors import weights
from pipeline.vision.extractors.grid import suggest
from pipeline.vision.preprocess.image import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from torch import Tensor, nn

STRIDE = 32  # pixels to whose multiples pictures are padded: no level of the pyramid is cut
CALIBRATION_SIZE = 256  # pixels a side of the noise that batch norms of random networks see

# Their published weights were trained with batch norms that added nothing to the variance; with
# torchvision's usual 1e-5 boxes and features are slightly other ones, and nothing says so.
_EPSILON_ZERO = ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn")


@dataclass(frozen=True)
class Detections:
    """What the box head says of the N proposals of one picture; boxes are in its pixels."""

    boxes: "Tensor"  # (N, 4) x1, y1, x2, y2, as proposed
    values: "Tensor"  # (N, D) the box head's output
    probabilities: "Tensor"  # (N, C), of which class 0 is background
    refinements: "Tensor"  # (N, C, 4) boxes as the box head corrects them, for each class
    pyramid: Mapping[str, "Tensor"]  # the maps, by level, that regions are pooled from
    padded_size: tuple[int, int]  # height and width in pixels that the maps cover
    size: tuple[int, int]  # height and width of the picture


@dataclass(frozen=True)
class Loaded:
    """A picture, normalized and padded (1, 3, H, W), and its height and width without padding."""

    images: "Tensor"
    size: tuple[int, int]


class Detector:
    """A frozen R-CNN. Pictures go through it one by one, so that none reaches another's."""

    def __init__(
        self,
        kind: str,
        network: str,
        weights_choice: str,
        num_classes: int,
        num_proposals: int,
        device: str,
    ) -> None:
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(weights.RANDOM_SEED)
            model: Any = build(kind, network, num_classes, num_proposals)
        self.batch_norm_epsilon = _set_epsilon(model, network, weights_choice)
        self._device = device
        self._mean, self._std = (
            torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        self.model = model  # torchvision's modules have no types
        if weights_choice == "random":
            self.weights, self.digest = weights_choice, weights.digest(model)
            weights.calibrate(model, self._run, CALIBRATION_SIZE)
        else:
            self.weights = weights.fill(model, network, weights_choice)
            self.digest = weights.digest(model)
        self.model = model.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        self.dim: int = model.roi_heads.box_predictor.cls_score.in_features

    def load(self, pixels: Pixels) -> Loaded:
        """Returns one picture (height, width, 3) as the network takes it, on its device."""
        import torch

        height, width = pixels.shape[:2]
        picture = torch.from_numpy(np.array(pixels)).to(self._device)  # Pillow's are read-only
        picture = picture.permute(2, 0, 1).unsqueeze(0).float().div_(255)
        picture = picture.sub_(self._mean).div_(self._std)
        right, below = -width % STRIDE, -height % STRIDE
        images = torch.nn.functional.pad(picture, (0, right, 0, below))
        return Loaded(images, (height, width))

    def detect(self, loaded: Loaded) -> Detections:
        """Runs everything but the selection on one picture."""
        from torchvision.models.detection.image_list import ImageList

        images, (height, width) = loaded.images, loaded.size
        padded = (images.shape[2], images.shape[3])
        pyramid = self.model.backbone(images)
        proposals, _ = self.model.rpn(ImageList(images, [(height, width)]), pyramid)
        heads = self.model.roi_heads
        # The pooler takes the scale of its levels from the size it is told, of the first picture
        # it ever sees; of the padded size it comes out the same, and right, for every picture.
        pooled = heads.box_roi_pool(pyramid, proposals, [padded])
        values = heads.box_head(pooled)
        logits, deltas = heads.box_predictor(values)
        refinements = heads.box_coder.decode(deltas, proposals)
        refinements[..., 0::2].clamp_(0, width)
        refinements[..., 1::2].clamp_(0, height)
        return Detections(
            boxes=proposals[0],
            values=values,
            probabilities=logits.softmax(dim=1),
            refinements=refinements,
            pyramid=pyramid,
            padded_size=padded,
            size=(height, width),
        )

    def _run(self, images: "Tensor") -> None:
        """Takes normalized noise (B, 3, S, S) through every layer with statistics."""
        from torchvision.models.detection.image_list import ImageList

        sizes = [(CALIBRATION_SIZE, CALIBRATION_SIZE)] * len(images)
        pyramid = self.model.backbone(images)
        proposals, _ = self.model.rpn(ImageList(images, sizes), pyramid)
        heads = self.model.roi_heads
        heads.box_head(heads.box_roi_pool(pyramid, proposals, sizes))
        if heads.mask_roi_pool is not None:
            few = [boxes[:8] for boxes in proposals]
            heads.mask_head(heads.mask_roi_pool(pyramid, few, sizes))


def build(kind: str, network: str, num_classes: int, num_proposals: int) -> "nn.Module":
    """Returns a network of torchvision's `kind`, fasterrcnn or maskrcnn, initialised at random.

    Raises ConfigError for a name that torchvision does not know.
    """
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models.detection, include=f"{kind}*")
    if network not in known:
        raise ConfigError(
            f"extractor.network: found {network!r}; {suggest(network, known)}expected one of "
            f"{', '.join(known)}"
        )
    model: nn.Module = torchvision.models.get_model(
        network,
        weights=None,
        weights_backbone=None,
        num_classes=num_classes,
        rpn_pre_nms_top_n_test=max(1000, num_proposals),
        rpn_post_nms_top_n_test=num_proposals,
    )
    return model.eval()


def class_names(network: str, num_classes: int) -> tuple[str, ...] | None:
    """Returns torchvision's names of the classes, background first, if their number fits."""
    import torchvision

    meta: dict[str, Any] = torchvision.models.get_model_weights(network).DEFAULT.meta
    names = tuple(meta["categories"])
    return names if len(names) == num_classes else None


def _set_epsilon(model: "nn.Module", network: str, weights_choice: str) -> float:
    from torch import nn

    epsilon = 0.0 if network in _EPSILON_ZERO and weights_choice != "random" else None
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for layer in layers:
        layer.eps = layer.eps if epsilon is None else epsilon
    return layers[0].eps
