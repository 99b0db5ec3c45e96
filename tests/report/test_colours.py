import base64
import io

import numpy as np
from PIL import Image

from pipeline.report.colours import colour_layer, principal_colours


def test_alike_vectors_have_like_colours_and_others_do_not() -> None:
    rng = np.random.default_rng(0)
    kinds = rng.standard_normal((3, 9), np.float32) * 10
    which = rng.integers(0, 3, 700)
    values = (kinds[which] + rng.standard_normal((700, 9)) / 10).astype(np.float32)
    colours = principal_colours(values).astype(int)
    assert colours.shape == (700, 3)
    means = np.stack([colours[which == kind].mean(axis=0) for kind in range(3)])
    assert np.abs(means[:, None] - means[None]).sum(axis=2)[~np.eye(3, dtype=bool)].min() > 100
    within = [colours[which == kind][:, :2].std(axis=0).max() for kind in range(3)]
    assert max(within) < 10
    np.testing.assert_array_equal(principal_colours(values), colours)


def test_the_largest_difference_is_red() -> None:
    values = np.zeros((5, 4), np.float32)
    values[:, 2] = [0, 1, 2, 3, 4]
    colours = principal_colours(values)
    assert colours[0, 0] == 0
    assert colours[4, 0] == 255
    assert not principal_colours(np.ones((3, 2), np.float32)).any()


def test_a_layer_has_a_pixel_for_each_cell() -> None:
    colours = np.arange(18, dtype=np.uint8).reshape(6, 3)
    url = colour_layer(colours, (2, 3))
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert picture.size == (3, 2)
    assert picture.getpixel((1, 1)) == (12, 13, 14)
