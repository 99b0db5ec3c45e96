"""The packed layout of a padded batch: layers do no work on padding."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedLayout:
    """B sequences of S positions, N of which are not padding, and which of them see which.

    All that a layer does but attention, it does to each position by itself. So states are kept
    packed, (N, D), and padded to the sequences they are, (B, S, D), only where they attend.
    Where nothing is padding, and in a compiled graph, whose shapes must not depend on the data,
    packed states are the padded ones: (B, S, D).
    """

    mask: Tensor  # broadcasts to (B, H, S, S), query by key, True = visible
    shape: tuple[int, int]  # B, S
    indices: Tensor | None = None  # (N,) int64, among B * S; None: all

    @classmethod
    def of(cls, padding: Tensor, mask: Tensor | None = None) -> "PackedLayout":
        """Reads bool padding (B, S). If no mask is given, all see all that is not padding."""
        is_packed = not torch.compiler.is_compiling() and bool(padding.any())
        indices = (~padding).flatten().nonzero().squeeze(1) if is_packed else None
        batch_size, num_positions = padding.shape
        return cls(
            mask=full_mask(padding) if mask is None else mask,
            shape=(batch_size, num_positions),
            indices=indices,
        )

    def pack(self, states: Tensor) -> Tensor:
        """Maps (B, S, D) to packed states."""
        return (
            states if self.indices is None else states.flatten(0, 1).index_select(0, self.indices)
        )

    def pad(self, packed: Tensor) -> Tensor:
        """Maps packed states to (B, S, D), with zeros for padding."""
        if self.indices is None:
            return packed
        width = packed.shape[-1]
        empty = packed.new_zeros(self.shape[0] * self.shape[1], width)
        return empty.index_copy(0, self.indices, packed).view(*self.shape, width)


def full_mask(padding: Tensor) -> Tensor:
    """Every position sees all that is not padding: bool padding (B, L) to (B, 1, 1, L)."""
    return ~padding[:, None, None, :]


def prefix_mask(token_padding: Tensor, region_padding: Tensor) -> Tensor:
    """The image is a prefix: regions see regions, a token sees regions and tokens up to itself.

    Maps bool padding (B, T) and (B, R) to (B, 1, T+R, T+R), text first. Every position sees itself,
    so that padding reads something finite.
    """
    num_tokens, num_regions = token_padding.shape[1], region_padding.shape[1]
    size = num_tokens + num_regions
    order = torch.ones(size, size, dtype=torch.bool, device=token_padding.device)
    order[:num_tokens, :num_tokens] = order[:num_tokens, :num_tokens].tril()
    order[num_tokens:, :num_tokens] = False
    visible = full_mask(torch.cat([token_padding, region_padding], dim=1)) & order
    return visible | torch.eye(size, dtype=torch.bool, device=order.device)
