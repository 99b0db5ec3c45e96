import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.read.extractor_card import ExtractorCard
from pipeline.errors import ConfigError, FeatureError
from pipeline.vision.extractor import INVARIANCE_TOLERANCE, measure_invariance
from pipeline.vision.extractors.grid import GridConfig
from pipeline.vision.extractors.registry import from_card
from tests.vision.photo_dataset import picture

SQUEEZENET = GridConfig(network="squeezenet1_0", node="features", weights="random", image_size=64)


def classify(network: str, shared_data: Path, node: str) -> GridConfig:
    """The preprocessing that the expected outputs were computed with."""
    weights = shared_data / "weights" / f"{network}.imagenet.fp16.safetensors"
    return GridConfig(network=network, node=node, weights=str(weights), fit="crop")


@pytest.mark.parametrize("network", ["mobilenet_v2", "squeezenet1_0"])
def test_pretrained_features_are_the_published_ones(shared_data: Path, network: str) -> None:
    expected = np.load(shared_data / "weights" / "expected_outputs.npz")
    extractor = classify(network, shared_data, "features").build()
    prepared = [extractor.prepare((shared_data / name).read_bytes()) for name in expected["files"]]
    features = extractor.extract(prepared)
    found = np.stack([feature.values.astype(np.float32).mean(axis=0) for feature in features])
    reference = expected[f"{network}__features_mean"]
    # float16 keeps 11 bits; the mean of 49 or 169 cells is better than that
    np.testing.assert_allclose(found, reference, atol=2e-3 * np.abs(reference).max())
    cosine = (found * reference).sum(1) / np.linalg.norm(found, axis=1)
    np.testing.assert_allclose(cosine / np.linalg.norm(reference, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("network", "node"), [("mobilenet_v2", "classifier"), ("squeezenet1_0", "flatten")]
)
def test_pretrained_network_sees_what_is_in_the_photographs(
    shared_data: Path, network: str, node: str
) -> None:
    expected = json.loads((shared_data / "weights" / "expected_top5.json").read_text())["images"]
    extractor = classify(network, shared_data, node).build()
    assert extractor.card().grid == (1, 1)
    prepared = [extractor.prepare((shared_data / name).read_bytes()) for name in expected]
    for feature, (name, outputs) in zip(extractor.extract(prepared), expected.items(), strict=True):
        logits = torch.from_numpy(feature.values[0].astype(np.float32))
        shares = torch.softmax(logits, 0)
        for index, _, share in outputs[network]["top5"]:
            assert float(shares[index]) == pytest.approx(share, abs=2e-3), name
        assert int(shares.argmax()) == outputs[network]["top5"][0][0], name


def test_cells_are_ordered_row_by_row() -> None:
    config = SQUEEZENET.model_copy(update={"node": "features.2"})  # shallow: edges reach few cells
    extractor = config.build()
    left_half_white = np.zeros((64, 64, 3), np.uint8)
    left_half_white[:, :32] = 255
    buffer = io.BytesIO()
    Image.fromarray(left_half_white).save(buffer, "PNG")
    (feature,) = extractor.extract([extractor.prepare(buffer.getvalue())])
    assert feature.values.shape == (14 * 14, 96)
    assert feature.values.dtype == np.float16
    cells = feature.values.reshape(14, 14, 96)[2:-2, 2:-2]
    np.testing.assert_array_equal(cells[0], cells[-1])
    assert not np.array_equal(cells[:, 0], cells[:, -1])


@pytest.mark.parametrize(
    ("network", "node", "grid", "dim"),
    [
        ("resnet18", "layer4", (2, 3), 512),
        ("resnet18", "flatten", (1, 1), 512),
        ("mobilenet_v2", "features.13", (4, 4), 96),
        ("convnext_tiny", "features", (2, 2), 768),
    ],
)
def test_any_node_of_any_network_gives_its_map(
    network: str, node: str, grid: tuple[int, int], dim: int
) -> None:
    grid = (2, 2) if node == "layer4" else grid
    extractor = GridConfig(network=network, node=node, weights="random", image_size=64).build()
    (feature,) = extractor.extract([extractor.prepare(picture(0))])
    card = extractor.card()
    assert (card.grid, card.dim) == (grid, dim)
    assert feature.values.shape == (card.num_regions, dim)
    assert card.weights is not None
    assert card.weights.random


@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_feature_does_not_depend_on_its_batch(photographs: list[Path], fit: Any) -> None:
    config = GridConfig(
        network="squeezenet1_0",
        node="features",
        weights="random",
        fit=fit,
    )
    extractor = config.build()
    photos = photographs[:5]
    prepared = [extractor.prepare(path.read_bytes()) for path in photos]
    found = measure_invariance(extractor, prepared)
    assert found.images == len(photos)
    assert found.largest_difference <= INVARIANCE_TOLERANCE


def test_random_weights_are_the_same_every_time_and_leave_other_randomness_alone() -> None:
    torch.manual_seed(5)
    untouched = torch.rand(3)
    torch.manual_seed(5)
    first, second = SQUEEZENET.build(), SQUEEZENET.build()
    assert torch.equal(torch.rand(3), untouched)
    assert first.name == second.name
    prepared = first.prepare(picture(1))
    np.testing.assert_array_equal(
        first.extract([prepared])[0].values, second.extract([prepared])[0].values
    )


@pytest.mark.parametrize("network", ["mobilenet_v2", "resnet50"])
def test_random_features_of_deep_networks_fit_float16(network: str) -> None:
    node = "layer4" if network == "resnet50" else "features"
    extractor = GridConfig(network=network, node=node, weights="random", image_size=64).build()
    (feature,) = extractor.extract([extractor.prepare(picture(1))])
    size = np.abs(feature.values.astype(np.float64)).max()
    assert 0.1 < size < 20_000


def test_identity_is_of_the_weights_not_of_their_file(
    squeezenet_file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(squeezenet_file.read_bytes())
    settings = {"network": "squeezenet1_0", "node": "features"}
    from_original = GridConfig(weights=str(squeezenet_file), **settings).build()
    from_copy = GridConfig(weights=str(copy), **settings).build()
    random = GridConfig(weights="random", **settings).build()
    assert from_original.name == from_copy.name != random.name


@pytest.mark.parametrize(
    "change", [{"image_size": 96}, {"fit": "crop"}, {"node": "features.7"}], ids=str
)
def test_identity_changes_with_whatever_changes_features(change: dict[str, Any]) -> None:
    changed = GridConfig.model_validate(SQUEEZENET.model_dump() | change)
    assert changed.build().name != SQUEEZENET.build().name


def test_boxes_of_cropped_cells_are_fractions_of_the_whole_picture() -> None:
    extractor = GridConfig(
        network="squeezenet1_0", node="features", weights="random", image_size=64, fit="crop"
    ).build()
    (feature,) = extractor.extract([extractor.prepare(picture(0, width=400, height=200))])
    assert feature.boxes is not None
    assert feature.boxes.shape == (9, 4)
    assert feature.boxes[0, 0] == pytest.approx(0.28, abs=0.01)  # 41 of 146 pixels cut away
    assert feature.boxes[8, 2] == pytest.approx(0.72, abs=0.01)
    assert feature.boxes[0, 1] == pytest.approx(1 / 16, abs=0.01)
    assert (feature.boxes[1, 0], feature.boxes[3, 1]) == (feature.boxes[0, 2], feature.boxes[0, 3])
    assert extractor.card().boxes == "stored"


def test_extractor_comes_back_from_its_card(squeezenet_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(squeezenet_file.read_bytes())
    config = GridConfig(network="squeezenet1_0", node="features", weights=str(path))
    card = ExtractorCard.parse(config.build().card().plain(), "card")
    assert from_card(card).card() == card
    with pytest.raises(FeatureError, match="replaced"):
        from_card(card.model_copy(update={"identity": "0" * 32}))
    path.unlink()
    with pytest.raises(FeatureError, match=r"weights\.safetensors"):
        from_card(card)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"network": "resnet5"}, ConfigError, "did you mean 'resnet50'"),
        ({"network": "fasterrcnn_resnet50_fpn"}, ConfigError, "extractor.network"),
        ({"node": "layer4"}, ConfigError, "squeezenet1_0 has no 'layer4'.*features"),
        (
            {"network": "vit_b_16", "node": "encoder", "image_size": 224},
            ConfigError,
            "expected a map",
        ),
        ({"weights": "absent.pth"}, FeatureError, "no such file"),
        ({"weights": "imagenet"}, FeatureError, "expected 'default', 'random' or a file"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused_beforehand(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    config = GridConfig.model_validate(SQUEEZENET.model_dump() | change)
    with pytest.raises(error, match=words):
        config.check()


def test_values_beyond_float16_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = SQUEEZENET.load("cpu")
    large = torch.full((1, 512, 3, 3), 1e5)
    monkeypatch.setattr(extractor._network, "forward", lambda _: {"map": large})
    with pytest.raises(FeatureError, match=r"1e\+05 do not fit float16"):
        extractor.extract([extractor.prepare(picture(0))])
