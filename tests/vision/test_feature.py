"""The feature of an image, as it is stored."""

import numpy as np

from pipeline.vision.feature import Feature, Mask, Projection, Quantized


def test_the_bytes_of_a_feature_are_those_of_what_is_stored() -> None:
    boxes, labels = np.zeros((3, 4), np.float32), np.zeros(3, np.int32)
    whole = Feature(np.zeros((3, 8), np.float32), boxes, {"labels": labels})
    assert whole.size_bytes == 3 * 8 * 4 + 3 * 4 * 4 + 3 * 4
    levels = Quantized(np.zeros((3, 8), np.int8), np.zeros((3, 1), np.float32))
    masked = Feature(levels.restore(), None, masks=(Mask(2, 2, "ab"),), quantized=levels)
    assert masked.size_bytes == 3 * 8 + 3 * 4 + 2


def test_reduced_values_are_brought_back_to_all_dimensions() -> None:
    values = np.random.default_rng(0).random((3, 4)).astype(np.float32)
    projection = Projection(np.ones(4, np.float32), np.eye(4, dtype=np.float32)[:2])
    reduced = Feature(projection.project(values), None, projection=projection)
    found = reduced.as_computed()
    np.testing.assert_allclose(found[:, :2], values[:, :2], rtol=1e-6)
    np.testing.assert_array_equal(found[:, 2:], 1)  # the mean
