"""Fixtures of the training tests."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def alone() -> Iterator[None]:
    """A process group of this process only; one a session, since DeepSpeed remembers it."""
    os.environ["LOCAL_RANK"] = "0"
    os.environ["DS_ACCELERATOR"] = "cpu"
    made_here = not torch.distributed.is_initialized()  # a stage on one process leaves its own
    if made_here:
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    if made_here:
        torch.distributed.destroy_process_group()
