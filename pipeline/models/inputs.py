"""The inputs of every model family, and the outputs of its encoder."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.models.tensors import mapped


@dataclass(frozen=True)
class Inputs:
    """One batch: B samples, T tokens, R regions, F feature dimensions.

    Tokens are padded on the right; padded regions may stand anywhere. Padding is True where there
    is nothing to see. Features are floats as the extractor made them, or a patch's own uint8
    values, which the model maps to [-1, 1]; of a model that sees by its backbone F is 0, and the
    pictures stand beside them. Boxes are x1, y1, x2, y2 as fractions of width and height.
    """

    tokens: Tensor  # (B, T) int64
    token_padding: Tensor  # (B, T) bool
    features: Tensor  # (B, R, F) uint8 or float
    boxes: Tensor  # (B, R, 4) float32
    region_padding: Tensor  # (B, R) bool
    pixels: Tensor | None = None  # (B, S, S, 3) uint8: whole pictures, for a backbone
    masked_regions: Tensor | None = None  # (B, R) bool: features hidden for masked region modelling

    def to(self, device: torch.device | str) -> "Inputs":
        """Returns the batch on a device; pinned tensors are copied without waiting."""
        return mapped(self, lambda tensor: tensor.to(device, non_blocking=True))

    def select(self, samples: Tensor) -> "Inputs":
        """Returns these samples (N,), with no more tokens than the longest; regions as padded."""
        num_tokens = int((~self.token_padding[samples]).sum(dim=1).max())
        words = replace(
            self,
            tokens=self.tokens[:, :num_tokens],
            token_padding=self.token_padding[:, :num_tokens],
        )
        return mapped(words, lambda tensor: tensor[samples])

    def without_image(self) -> "Inputs":
        """Returns the batch with no regions at all: what a blind twin sees."""
        return replace(
            self,
            features=self.features[:, :0],
            boxes=self.boxes[:, :0],
            region_padding=self.region_padding[:, :0],
            pixels=None,
            masked_regions=None,
        )


@dataclass(frozen=True)
class Encoded:
    """What an encoder makes of a batch: B samples, T tokens, R regions, D width, H heads.

    Where regions have a stream of their own, they and `pooled` may have another width, and a row
    of an attention map holds two distributions, one over text and one over regions.
    """

    text: Tensor  # (B, T, D)
    regions: Tensor  # (B, R, D)
    pooled: Tensor  # (B, D)
    attention: tuple[Tensor, ...] | None  # if asked for: per layer in which text and regions meet,
    # query by key, (B, H, T+R, T+R), text first; what padding looks at means nothing


@dataclass(frozen=True)
class Cache:
    """Keys and values of what a decoder has read so far: B sequences, L positions, d head width."""

    layers: tuple[tuple[Tensor, Tensor], ...]  # per layer keys and values, (B, H, L, d) each
    padding: Tensor  # (B, L) bool
    num_tokens: Tensor  # (B,) int64: real tokens read, which is the next token's position

    def select(self, rows: Tensor) -> "Cache":
        """Returns the cache of these rows (N,), in this order; a row may come more than once."""
        return Cache(
            layers=tuple((keys[rows], values[rows]) for keys, values in self.layers),
            padding=self.padding[rows],
            num_tokens=self.num_tokens[rows],
        )
