"""Every family sees through a backbone as it sees features, and is saved as it is without."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.families import FAMILIES, build, from_saved, load_weights, to_saved
from pipeline.models.generation import generate
from pipeline.models.inputs import Inputs
from tests.models.examples import FEATURES, assert_close, batch, randomise
from tests.models.test_families import CONFIGS

SIDE = 4  # pixels of a picture
REGIONS = 5  # of the examples


class Linear(nn.Module):
    """A backbone of one layer, which gives all regions of a picture at once."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * SIDE * SIDE, REGIONS * FEATURES)

    def forward(self, pixels: Tensor | None) -> Tensor:
        if pixels is None:
            pixels = torch.zeros(0, SIDE, SIDE, 3, dtype=torch.uint8)
        seen: Tensor = self.layer(pixels.flatten(1).float() / 255)
        return seen.view(-1, REGIONS, FEATURES)


def pictures() -> Inputs:
    inputs = batch()
    shape = (len(inputs.tokens), SIDE, SIDE, 3)
    values = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1))
    return replace(inputs, features=inputs.features[..., :0], pixels=values.to(torch.uint8))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_with_a_backbone_is_the_family_on_the_backbones_features(family: str) -> None:
    backbone = Linear()
    plain = randomise(build(CONFIGS[family]()))
    live = build(plain.config, backbone).eval()
    load_weights(live, to_saved(plain.config, dict(plain.named_parameters()))[1])
    assert isinstance(live, FAMILIES[family].model)
    inputs = pictures()
    features = replace(inputs, features=backbone(inputs.pixels), pixels=None)
    with torch.no_grad():
        found, expected = live.encode(inputs), plain.encode(features)
        assert_close(found.text, expected.text)
        assert_close(live.answer_logits(found, inputs), plain.answer_logits(expected, features))
        if "prefix" in live.masks:
            words = [
                generate(model, given, eos=3, max_new_tokens=4, beams=2)  # type: ignore[arg-type]
                for model, given in ((live, inputs), (plain, features))
            ]
            assert words[0] == words[1]


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_reach_the_backbone_through_every_family(family: str) -> None:
    backbone = Linear()
    model = build(CONFIGS[family](), backbone)
    loss = model.match_logits(model.encode(pictures())).square().sum()
    torch.autograd.backward(loss)
    assert backbone.layer.weight.grad is not None
    assert bool(backbone.layer.weight.grad.abs().sum() > 0)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_blind_model_looks_at_no_picture_and_trains_nothing_of_its_backbone(family: str) -> None:
    backbone = Linear()
    model = build(CONFIGS[family](), backbone)
    encoded = model.encode(pictures().without_image())
    torch.autograd.backward(model.match_logits(encoded).square().sum())
    assert backbone.layer.weight.grad is None or not backbone.layer.weight.grad.any()


@pytest.mark.parametrize("family", CONFIGS)
def test_a_checkpoint_of_the_class_that_stood_before_the_family_is_read(family: str) -> None:
    """Names and their order are those of `type("Live…", (LiveModel, family), {})` of then."""
    config, backbone = CONFIGS[family](), Linear()
    then = FAMILIES[family].model(config)
    then.__dict__.pop("backbone")  # no family had it
    then.add_module("backbone", backbone)
    saved = randomise(then).state_dict()
    assert list(saved)[-2:] == ["backbone.layer.weight", "backbone.layer.bias"]
    now = build(config, Linear())
    assert [name for name, _ in now.named_parameters()] == [
        name for name, _ in then.named_parameters()
    ]
    now.load_state_dict(saved)
    for name, tensor in now.state_dict().items():
        assert torch.equal(tensor, saved[name]), name


def test_the_family_is_saved_without_its_backbone() -> None:
    config = CONFIGS["visualbert"]()
    model = randomise(build(config, Linear()))
    document, tensors = to_saved(config, dict(model.named_parameters()), [""] * config.num_answers)
    assert not any("backbone" in name for name in tensors)
    other = Linear()
    again, report = from_saved(document, tensors, backbone=other)
    assert again.get_submodule("backbone") is other
    assert set(report.new) == {"backbone.layer.weight", "backbone.layer.bias"}
    for name, parameter in again.named_parameters():
        if not name.startswith("backbone."):
            assert torch.equal(parameter, model.get_parameter(name))
