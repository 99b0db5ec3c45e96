"""Deterministic arithmetic of frozen networks."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """No gradients, float32 as such, and convolutions that do not depend on what ran before."""
    import torch

    with (
        torch.inference_mode(),
        torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ),
    ):
        yield
