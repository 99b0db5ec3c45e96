"""Floating-point operations of encoding a sample, by a model's sizes and the sample's lengths.

Matrix products and convolutions count, two operations for each multiplication and addition, of
real tokens and regions: what is spent on padding, or on recomputing, is not useful.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.models import families
from pipeline.models.base import ModelConfig, VisionLanguageModel
from pipeline.models.inputs import Inputs


class EncodingFlops:
    """Counts by running a model on shapes alone, without weights or arithmetic."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._known: dict[tuple[int, int], int] = {}

    def of(self, num_tokens: int, num_regions: int) -> int:
        """Returns the operations of `encode`, forward, for one sample without padding."""
        lengths = (num_tokens, num_regions)
        if lengths not in self._known:
            self._known[lengths] = self._count(*lengths)
        return self._known[lengths]

    @cached_property
    def _model(self) -> VisionLanguageModel:
        with torch.device("meta"):
            return families.build(self._config).eval()

    def _count(self, num_tokens: int, num_regions: int) -> int:
        # Imported when it is needed: it brings torch's decompositions along.
        from torch.utils.flop_counter import FlopCounterMode

        with torch.device("meta"):
            inputs = Inputs(
                tokens=torch.zeros(1, num_tokens, dtype=torch.long),
                token_padding=torch.zeros(1, num_tokens, dtype=torch.bool),
                features=torch.zeros(1, num_regions, self._config.feature_dim),
                boxes=torch.zeros(1, num_regions, 4),
                region_padding=torch.zeros(1, num_regions, dtype=torch.bool),
            )
            # Attention made of matrix products: the counter knows few of the fused kernels.
            with (
                torch.no_grad(),
                _NothingPadded(),  # type: ignore[no-untyped-call]
                FlopCounterMode(display=False) as counter,
                sdpa_kernel(SDPBackend.MATH),
            ):
                self._model.encode(inputs)
        return int(counter.get_total_flops())


class _NothingPadded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers what a model asks of the values of its inputs: whether any position is padding."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False
        return func(*args, **(kwargs or {}))
