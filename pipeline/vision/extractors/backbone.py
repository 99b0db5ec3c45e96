"""The backbone: a network, trained in the model, that makes its regions from pixels."""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.vision.preprocess.image import IMAGENET_MEAN, IMAGENET_STD

NETWORK = "network"  # the module's name, before that of each of torchvision's parameters


class Backbone(nn.Module):
    """A torchvision network up to one of its nodes, whose map's cells are the regions.

    It stays in evaluation mode while its weights are trained: batch norms keep the statistics that
    they came with, and nothing is dropped. With the statistics of a batch a sample's loss would
    depend on its neighbours, and on how samples are divided among ranks and micro-batches, which
    hold too few of them to estimate any.
    """

    def __init__(self, network: nn.Module, image_size: int) -> None:
        super().__init__()
        self.network = network.eval()
        self.image_size = image_size
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                _fix(module)

    def train(self, mode: bool = True) -> Self:
        """Sets nothing but the flag of this module: see above."""
        self.training = mode
        return self

    def forward(self, pixels: Tensor | None) -> Tensor:
        """Maps pictures (B, S, S, 3) of uint8 to features of their regions (B, R, C).

        None is no picture at all, as a blind model has it: (0, R, C).
        """
        weight = next(self.network.parameters())
        if pixels is None:
            size = self.image_size
            pixels = weight.new_zeros(0, size, size, 3, dtype=torch.uint8)
        pictures = normalized(pixels.permute(0, 3, 1, 2)).to(weight.dtype)
        maps: Tensor = self.network(pictures)["map"]
        return maps.flatten(2).mT if maps.ndim == 4 else maps.unsqueeze(1)


def _fix(norm: _BatchNorm) -> None:
    """Makes a norm's statistics parameters that are never trained, kept and saved as all others."""
    norm.num_batches_tracked = None
    for name in ("running_mean", "running_var"):
        values = norm._buffers.pop(name)
        assert values is not None
        norm.register_parameter(name, nn.Parameter(values, requires_grad=False))


def normalized(pictures: Tensor) -> Tensor:
    """Maps pictures (B, 3, S, S) of uint8 to the floats that torchvision's networks know."""
    mean, std = (
        torch.tensor(values, device=pictures.device).view(1, 3, 1, 1)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (pictures.float() / 255 - mean) / std
