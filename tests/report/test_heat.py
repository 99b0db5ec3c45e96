import base64

import numpy as np
import pytest

from pipeline.report.examples import Attention
from pipeline.report.heat import attention_heat, heat
from tests.report.conftest import grid_boxes


def levels(maps: str, regions: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(maps), np.uint8).reshape(-1, regions)


def test_the_first_maps_are_the_mean_of_the_layers_and_tokens_run_fastest() -> None:
    weights = np.random.default_rng(0).random((2, 3, 20), dtype=np.float32)

    packed = attention_heat(Attention(("a", "b", "c"), weights, grid_boxes(4, 5), (4, 5)))

    maps = levels(packed.maps, 20)
    assert maps.shape == ((2 + 1) * 3, 20)
    assert maps[1].argmax() == weights.mean(axis=0)[1].argmax()
    assert maps[3 + 2].argmax() == weights[0, 2].argmax()
    assert maps[6].argmax() == weights[1, 0].argmax()
    assert float(packed.shares.split(",")[6]) == pytest.approx(weights[1, 0].sum(), rel=1e-3)
    assert float(packed.peaks.split(",")[6]) == pytest.approx(weights[1, 0].max(), rel=1e-3)


def test_each_map_is_scaled_to_its_own_peak_and_an_empty_one_stays_dark() -> None:
    maps = np.array([[0.1, 0.2], [0.0, 0.0]], np.float32)
    packed = heat(maps, np.zeros((2, 4), np.float32), None)
    assert levels(packed.maps, 2).tolist() == [[128, 255], [0, 0]]


def test_a_grid_of_the_middle_of_a_picture_says_where_it_lies() -> None:
    boxes = grid_boxes(3, 2) * [0.5, 1, 0.5, 1] + [0.25, 0, 0.25, 0]
    packed = heat(np.ones((1, 6), np.float32), boxes.astype(np.float32), (3, 2))
    assert (packed.grid, packed.boxes) == ("3,2", "0.25,0,0.75,1")


def test_regions_keep_every_box() -> None:
    packed = heat(np.ones((1, 2), np.float32), np.full((2, 4), 0.5, np.float32), None)
    assert (packed.grid, len(packed.boxes.split(","))) == ("", 8)
