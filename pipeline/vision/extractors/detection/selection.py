"""The selection of regions: the few proposals that stand for the picture.

The rule is that of bottom-up attention (Anderson et al., arXiv:1707.07998, and its published
extraction script), one function for each step. N proposals, C classes of which 0 is background.
A region is a proposal as the region proposal network gave it, so that its feature is of just this
box. Unlike the script, regions always come in the order of their scores, the highest first.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BACKGROUND = 0


def survivors(boxes: "Tensor", probabilities: "Tensor", nms_threshold: float) -> "Tensor":
    """Says which box is the best of its neighbourhood in which class: bool (N, C).

    Non-maximum suppression for every class on its own, over all boxes (N, 4): a box falls if one
    with a higher probability (N, C) of the same class overlaps it by more than the threshold.
    Nothing survives as background.
    """
    import torch
    from torchvision.ops import batched_nms

    num_boxes, num_classes = probabilities.shape
    foreground = num_classes - 1
    classes = torch.arange(1, num_classes, device=boxes.device).repeat(num_boxes)
    scores = probabilities[:, 1:].reshape(-1)
    kept = batched_nms(boxes.repeat_interleave(foreground, 0), scores, classes, nms_threshold)
    result = torch.zeros(num_boxes * foreground, dtype=torch.bool, device=boxes.device)
    result[kept] = True
    background = torch.zeros(num_boxes, 1, dtype=torch.bool, device=boxes.device)
    return torch.cat([background, result.view(num_boxes, foreground)], dim=1)


def confidences(probabilities: "Tensor", survived: "Tensor") -> "Tensor":
    """Returns for each box (N,) its highest probability in a class it survived in, or 0."""
    return probabilities.masked_fill(~survived, 0).amax(dim=1)


def choose(confidence: "Tensor", threshold: float, fewest: int, most: int) -> "Tensor":
    """Returns the indices of the boxes to keep, the most confident first, equals in given order.

    Those of at least the threshold are kept; but not fewer than `fewest`, the next best filling
    up, and not more than `most`. Where there are fewer boxes than `fewest`, all are kept.
    """
    order = confidence.argsort(descending=True, stable=True)
    confident = int((confidence >= threshold).sum())
    return order[: min(max(confident, fewest), most)]


def likeliest_classes(probabilities: "Tensor") -> tuple["Tensor", "Tensor"]:
    """Returns the likeliest class other than background of each box (N,), and its probability."""
    scores, labels = probabilities[:, 1:].max(dim=1)
    return labels + 1, scores


def as_fractions(boxes: "Tensor", height: int, width: int) -> "Tensor":
    """Maps pixels x1, y1, x2, y2 (N, 4) to fractions of the picture's width and height."""
    return (boxes / boxes.new_tensor([width, height, width, height])).clamp(0, 1)
