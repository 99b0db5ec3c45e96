from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from pipeline.data.read.images import live_features
from pipeline.vision.extractors.backbone import Backbone
from pipeline.vision.extractors.grid import GridConfig
from pipeline.vision.extractors.live import live_card, live_config
from tests.vision.photo_dataset import picture

SIZE = 64  # about twice the pictures', so that both decoders have all pixels


def grid(network: str, node: str) -> GridConfig:
    return GridConfig(network=network, node=node, weights="random", image_size=SIZE)


def pixels(config: GridConfig, count: int) -> torch.Tensor:
    live = live_config(live_card(config, None))
    assert live is not None
    batches = [live_features(picture(number), live).pixels for number in range(count)]
    return torch.from_numpy(np.concatenate([batch for batch in batches if batch is not None]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "node"),
    [
        ("resnet18", "layer4"),
        ("resnet18", "flatten"),  # pooled
        ("squeezenet1_0", "features.5"),  # 7 x 7 cells, which are in no whole number of pixels
        ("convnext_tiny", "features"),
    ],
)
def test_an_untrained_backbone_gives_the_stored_grid_features(network: str, node: str) -> None:
    config = grid(network, node)
    extractor = config.build()
    prepared = [extractor.prepare(picture(number)) for number in range(3)]
    stored = np.stack([feature.values for feature in extractor.extract(prepared)])
    with torch.no_grad():
        found = config.backbone()(pixels(config, 3)).numpy()
    assert found.shape == stored.shape
    # Decoded and scaled by other libraries, a pixel differs by one of 255 levels here and there.
    scale = np.sqrt(np.mean(stored.astype(np.float32) ** 2))
    assert np.abs(found - stored).max() < 0.03 * scale
    assert np.sqrt(np.mean((found - stored) ** 2)) < 0.005 * scale


def test_gradients_reach_every_weight_and_no_statistic() -> None:
    config = grid("resnet18", "layer4")
    backbone = config.backbone().train()
    backbone(pixels(config, 2)).square().mean().backward()
    for name, parameter in backbone.named_parameters():
        if name.endswith(("running_mean", "running_var")):
            assert parameter.grad is None
            assert not parameter.requires_grad
        else:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.abs().sum() > 0), name


def test_a_picture_does_not_see_its_neighbours_while_training() -> None:
    config = grid("resnet18", "layer3")
    backbone = config.backbone().train()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    pictures = pixels(config, 3)
    together = backbone(pictures)
    for i in range(3):
        found = backbone(pictures[i : i + 1])[0]
        torch.testing.assert_close(found, together[i], rtol=1e-4, atol=1e-4)
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("network", ["resnet18", "mobilenet_v2", "convnext_tiny"])
def test_a_blind_model_trains_nothing_of_it(network: str) -> None:
    node = {"resnet18": "layer4"}.get(network, "features")
    config = grid(network, node)
    backbone: Backbone = config.backbone().train()
    found = backbone(None)
    assert (len(found), found.shape[2]) == (0, live_card(config, None).dim)
    found.sum().backward()
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert not parameter.grad.any()


def test_weights_go_to_the_backbone_and_come_back(squeezenet_file: Path, tmp_path: Path) -> None:
    config = GridConfig(
        network="squeezenet1_0", node="features", weights=str(squeezenet_file), image_size=SIZE
    )
    saved = tmp_path / "backbone.safetensors"
    safetensors.torch.save_file(config.backbone().network.state_dict(), saved)
    again = config.model_copy(update={"weights": str(saved)})
    assert again.build().card().weights == config.build().card().weights
