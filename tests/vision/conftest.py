"""Fixtures of the tests of image networks."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torchvision.models import squeezenet1_0


@pytest.fixture(scope="session")
def squeezenet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights that fit, as a published one does; they have learnt nothing."""
    path = tmp_path_factory.mktemp("weights") / "squeezenet1_0.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        safetensors.torch.save_file(squeezenet1_0(weights=None).state_dict(), path)
    return path
