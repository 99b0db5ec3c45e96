import numpy as np
import pytest
import torch

from pipeline.vision.extractors.detection.selection import (
    as_fractions,
    choose,
    confidences,
    likeliest_classes,
    survivors,
)

# N=4 boxes, C=3 classes of which 0 is background. Boxes 0 and 1 overlap by 81 / 119.
BOXES = torch.tensor(
    [[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 11.0, 11.0], [20.0, 20.0, 30.0, 25.0], [0.0, 0.0, 2.0, 2.0]]
)
PROBABILITIES = torch.tensor([[0.1, 0.6, 0.3], [0.1, 0.5, 0.4], [0.7, 0.1, 0.2], [0.25, 0.7, 0.05]])


def reference_confidence(
    boxes: np.ndarray, probabilities: np.ndarray, threshold: float
) -> np.ndarray:
    """The published script's loop: for each class the boxes left by greedy suppression."""
    confidence = np.zeros(len(boxes))
    x1, y1, x2, y2 = boxes.T
    areas = (x2 - x1) * (y2 - y1)
    for scores in probabilities.T[1:]:
        order = list(np.argsort(-scores, kind="stable"))
        while order:
            best = order.pop(0)
            confidence[best] = max(confidence[best], scores[best])
            width = np.minimum(x2[best], x2) - np.maximum(x1[best], x1)
            height = np.minimum(y2[best], y2) - np.maximum(y1[best], y1)
            common = np.clip(width, 0, None) * np.clip(height, 0, None)
            overlap = common / (areas[best] + areas - common)
            order = [other for other in order if overlap[other] <= threshold]
    return confidence


def test_a_box_falls_in_the_classes_in_which_a_stronger_one_overlaps_it() -> None:
    kept = survivors(BOXES, PROBABILITIES, 0.5)
    assert kept.tolist() == [
        [False, True, False],
        [False, False, True],
        [False, True, True],
        [False, True, True],
    ]
    assert survivors(BOXES, PROBABILITIES, 0.7)[:, 1:].all()  # 81 / 119 is less


def test_confidence_is_the_best_class_a_box_survived_in() -> None:
    found = confidences(PROBABILITIES, survivors(BOXES, PROBABILITIES, 0.5))
    torch.testing.assert_close(found, torch.tensor([0.6, 0.4, 0.2, 0.7]))


def test_confidences_are_those_of_the_published_loop() -> None:
    rng = np.random.default_rng(3)
    corners = rng.random((40, 2)) * 50
    boxes = np.concatenate([corners, corners + 5 + rng.random((40, 2)) * 30], 1).astype(np.float32)
    probabilities = rng.dirichlet(np.ones(7), 40).astype(np.float32)
    expected = reference_confidence(boxes, probabilities, 0.3)
    assert (expected < probabilities[:, 1:].max(axis=1)).any()  # some fell in their best class
    given = torch.from_numpy(probabilities)
    found = confidences(given, survivors(torch.from_numpy(boxes), given, 0.3))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("threshold", "fewest", "most", "expected"),
    [
        (0.5, 1, 4, [3, 0]),
        (0.5, 3, 4, [3, 0, 1]),
        (0.1, 1, 2, [3, 0]),
        (0.9, 9, 9, [3, 0, 1, 2]),
        (0.6, 1, 4, [3, 0]),  # 0.6 is at the threshold
    ],
)
def test_the_confident_are_kept_within_bounds_the_best_first(
    threshold: float, fewest: int, most: int, expected: list[int]
) -> None:
    confidence = torch.tensor([0.6, 0.4, 0.2, 0.7])
    assert choose(confidence, threshold, fewest, most).tolist() == expected


def test_boxes_of_equal_confidence_keep_their_order() -> None:
    assert choose(torch.zeros(200), 0.2, 50, 50).tolist() == list(range(50))


def test_a_region_is_never_called_background() -> None:
    labels, scores = likeliest_classes(PROBABILITIES)
    assert labels.tolist() == [1, 1, 2, 1]
    torch.testing.assert_close(scores, torch.tensor([0.6, 0.5, 0.2, 0.7]))


def test_fractions_are_of_width_and_height_and_stay_in_the_picture() -> None:
    found = as_fractions(torch.tensor([[10.0, 5.0, 50.0, 20.5]]), height=20, width=40)
    torch.testing.assert_close(found, torch.tensor([[0.25, 0.25, 1.0, 1.0]]))
