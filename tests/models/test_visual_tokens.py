import torch

from pipeline.models.visual_tokens import Projection, Resampler
from tests.models.examples import randomise

B, R, F, D, Q = 2, 5, 6, 8, 3


def regions(generator: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(generator)
    padding = torch.zeros(B, R, dtype=torch.bool)
    padding[1, 3:] = True
    return torch.randn(B, R, F), padding


def resampler() -> Resampler:
    return randomise(Resampler(F, D, Q, num_layers=2, num_heads=2, intermediate_size=12))


def test_a_projection_makes_one_token_of_each_region() -> None:
    features, padding = regions()
    for num_layers in (1, 2):
        states, unseen = randomise(Projection(F, D, num_layers))(features, padding)
        assert states.shape == (B, R, D)
        assert unseen is padding


def test_a_resampler_makes_as_many_tokens_of_any_number_of_regions() -> None:
    model = resampler()
    features, padding = regions()
    for number in (1, 2, R):
        states, unseen = model(features[:, :number], padding[:, :number])
        assert (states.shape, unseen.shape) == ((B, Q, D), (B, Q))
        assert not unseen.any()


def test_what_lies_in_padding_changes_no_token() -> None:
    model = resampler()
    features, padding = regions()
    other = features.masked_fill(padding[:, :, None], 7.0)
    for one, another in zip(model(features, padding), model(other, padding), strict=True):
        torch.testing.assert_close(one, another)


def test_the_order_of_regions_changes_no_token() -> None:
    model = resampler()
    features, padding = regions()
    turned = model(features.flip(1), padding.flip(1))[0]
    torch.testing.assert_close(turned, model(features, padding)[0])


def test_of_an_image_without_regions_every_token_is_padding() -> None:
    model = resampler()
    features, padding = regions()
    padding[1] = True
    assert model(features, padding)[1].tolist() == [[False] * Q, [True] * Q]
    states, unseen = model(features[:, :0], padding[:, :0])
    assert (states.shape, unseen.shape) == ((B, 0, D), (B, 0))
