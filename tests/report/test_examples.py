import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import StageError
from pipeline.report.examples import (
    Attention,
    attention_over_regions,
    read_gallery,
    write_gallery,
)
from tests.report.conftest import grid_boxes, make_gallery


def test_a_gallery_reads_back_as_it_was_written(tmp_path: Path) -> None:
    gallery = make_gallery()

    location = write_gallery(str(tmp_path), gallery)
    found = read_gallery(str(tmp_path))

    assert location == str(tmp_path / "evaluation" / "examples.json")
    assert found.selection == gallery.selection
    for before, after in zip(gallery.examples, found.examples, strict=True):
        assert after.to_json() == before.to_json()
        assert after.image == before.image


def test_attention_survives_the_file_within_its_rounding() -> None:
    weights = np.random.default_rng(0).random((2, 3, 20), dtype=np.float32)
    attention = Attention(("a", "b", "c"), weights, grid_boxes(4, 5), (4, 5))

    found = Attention.from_json(json.loads(json.dumps(attention.to_json())))

    np.testing.assert_allclose(found.weights, weights, atol=1e-5)
    assert found.grid == (4, 5)


@pytest.mark.parametrize(
    ("tokens", "regions", "grid"),
    [(2, 20, (4, 5)), (3, 19, (4, 5)), (3, 20, (4, 4))],
    ids=["tokens", "boxes", "grid"],
)
def test_attention_of_parts_that_do_not_fit_is_refused(
    tokens: int, regions: int, grid: tuple[int, int]
) -> None:
    weights = np.zeros((2, 3, 20), np.float32)
    with pytest.raises(StageError, match="does not fit"):
        Attention(("w",) * tokens, weights, np.zeros((regions, 4), np.float32), grid)


def test_a_file_that_is_no_gallery_is_named(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "examples.json").write_text('{"examples": [{"key": "x"}]}')
    with pytest.raises(StageError, match=r"examples\.json"):
        read_gallery(str(tmp_path))


def test_attention_over_regions_is_the_mean_of_heads_from_the_asked_tokens_to_real_regions() -> (
    None
):
    b, h, t, r = 2, 3, 4, 6
    torch.manual_seed(0)
    layers = tuple(torch.rand(b, h, t + r, t + r).softmax(dim=-1) for _ in range(5))

    found = attention_over_regions(
        layers, sample=1, token_positions=[3, 0], num_text=t, num_regions=5
    )

    assert found.shape == (5, 2, 5)
    expected = sum(float(layers[4][1, head, 3, t + 2]) for head in range(h)) / h
    assert found[4, 0, 2] == pytest.approx(expected)
    expected = sum(float(layers[0][1, head, 0, t + 4]) for head in range(h)) / h
    assert found[0, 1, 4] == pytest.approx(expected)


def test_the_share_of_the_picture_and_of_the_text_make_one() -> None:
    t, r = 4, 6
    layers = (torch.rand(1, 2, t + r, t + r).softmax(dim=-1),)

    regions = attention_over_regions(layers, 0, [2], t, r)
    text = layers[0][0, :, 2, :t].mean(dim=0).sum()

    assert regions.sum() + float(text) == pytest.approx(1.0, abs=1e-6)


def test_attention_of_half_precision_and_of_gradients_is_read() -> None:
    layers = (torch.rand(1, 2, 5, 5, dtype=torch.bfloat16, requires_grad=True),)
    found = attention_over_regions(layers, 0, [0], 2, 3)
    assert found.dtype == np.float32
