import numpy as np
import pytest
import torch

from pipeline.errors import FeatureError
from pipeline.vision.compress.storage_dtype import (
    Storage,
    compare_storage,
    measure_storage_loss,
    storage_parts,
    to_storage,
)
from pipeline.vision.feature import Projection

# B=2, R=3, D=40: regions of very different strength, one of them all zero.
VALUES = torch.from_numpy(
    np.random.default_rng(0).standard_normal((2, 3, 40)).astype(np.float32)
) * torch.tensor([1.0, 0.0, 100.0]).view(1, 3, 1)


@pytest.mark.parametrize(("storage", "step"), [("int8", 2), ("int8-per-channel", 1)])
def test_int8_is_within_half_a_level_of_the_values(storage: Storage, step: int) -> None:
    for feature, values in zip(to_storage(VALUES, storage), VALUES.numpy(), strict=True):
        assert feature.quantized is not None
        assert feature.quantized.levels.dtype == np.int8
        level = np.abs(values).max(axis=step - 1, keepdims=True) / 127
        np.testing.assert_allclose(feature.quantized.scales, level, rtol=1e-6)
        assert (np.abs(feature.values - values) <= level * 0.5001).all()
        np.testing.assert_array_equal(feature.values, feature.quantized.restore())
        layout = storage_parts(storage, 40)["scales"]
        expected = [3 if axis == "R" else axis for axis in layout.shape]
        assert list(feature.quantized.scales.shape) == expected


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_floats_are_stored_as_such(storage: Storage) -> None:
    for feature, values in zip(to_storage(VALUES, storage), VALUES.numpy(), strict=True):
        assert feature.quantized is None
        np.testing.assert_array_equal(feature.values, values.astype(storage))


def test_what_float16_cannot_hold_is_refused_where_int8_can() -> None:
    large = VALUES * 1e4
    with pytest.raises(FeatureError, match="do not fit float16"):
        to_storage(large, "float16")
    assert to_storage(large, "int8")[0].values.max() > 65_504
    with pytest.raises(FeatureError, match="do not fit int8"):
        to_storage(large * float("inf"), "int8")


def test_an_image_does_not_depend_on_its_batch() -> None:
    for storage in ("int8", "int8-per-channel", "float16"):
        together = to_storage(VALUES, storage)
        alone = [to_storage(image.unsqueeze(0), storage)[0] for image in VALUES]
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_array_equal(a.values, b.values)


def test_the_error_is_relative_to_the_values() -> None:
    exact = to_storage(VALUES, "float32")
    assert measure_storage_loss(exact, exact).relative_rms == 0
    assert measure_storage_loss(exact, exact).bytes_per_image == 3 * 40 * 4
    halves = measure_storage_loss(exact, to_storage(VALUES, "float16"))
    rows = measure_storage_loss(exact, to_storage(VALUES, "int8"))
    channels = measure_storage_loss(exact, to_storage(VALUES, "int8-per-channel"))
    assert 1e-5 < halves.relative_rms < 5e-4 < rows.relative_rms < 0.01
    assert rows.cosine > 0.9999 > channels.cosine  # weak regions vanish beside strong ones
    assert (halves.bytes_per_image, rows.bytes_per_image) == (240, 3 * 40 + 3 * 4)


def test_every_form_of_storage_is_compared_with_what_was_computed() -> None:
    exact = to_storage(VALUES, "float32")
    projection = Projection(np.zeros(40, np.float32), np.eye(40, dtype=np.float32)[:30])
    found = compare_storage(exact, {"first 30": projection})
    assert list(found) == [
        *("float32", "float16", "int8", "int8-per-channel", "first 30 float32"),
        *("first 30 float16", "first 30 int8", "first 30 int8-per-channel"),
    ]
    assert found["float16"] == measure_storage_loss(exact, to_storage(VALUES, "float16"))
    assert found["first 30 float16"].bytes_per_image == 3 * 30 * 2
    lost = np.sqrt((VALUES[..., 30:] ** 2).sum() / (VALUES**2).sum())
    assert found["first 30 float32"].relative_rms == pytest.approx(float(lost), rel=1e-4)
