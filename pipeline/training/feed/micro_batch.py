"""The micro-batch, as far as the loop knows it."""

from typing import Any, Protocol

import torch


class MicroBatch(Protocol):
    """What a rank holds in one forward pass."""

    @property
    def num_samples(self) -> int: ...

    @property
    def num_tokens(self) -> int:
        """Real tokens and regions."""
        ...

    @property
    def num_tokens_with_padding(self) -> int:
        """The same with their padding."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Returns what the module's forward takes, on a device, in its weights' dtype."""
        ...
