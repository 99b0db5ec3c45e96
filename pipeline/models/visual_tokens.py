"""Visual tokens: what a language model is given to read of an image."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pipeline.models import blocks
from pipeline.models.packed import full_mask


class Projection(nn.Module):
    """One visual token for each region: a linear map, or two with a GELU (LLaVA, 2310.03744)."""

    def __init__(self, feature_dim: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.first = blocks.FeatureLinear(feature_dim, width)
        self.rest = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers - 1))

    def forward(self, features: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Maps features (B, R, F) and bool padding (B, R) to (B, R, D) and the same padding."""
        states: Tensor = self.first(features)
        for layer in self.rest:
            states = layer(F.gelu(states))
        return states, padding


class ResamplerLayer(nn.Module):
    """Queries read regions and each other, then a feed-forward; norms come first (Flamingo)."""

    def __init__(self, width: int, num_heads: int, intermediate_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.region_norm = nn.LayerNorm(width, eps=blocks.LAYER_NORM_EPS)
        self.query_norm = nn.LayerNorm(width, eps=blocks.LAYER_NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=blocks.LAYER_NORM_EPS)
        self.up = nn.Linear(width, intermediate_size)
        self.down = nn.Linear(intermediate_size, width)

    def forward(self, queries: Tensor, regions: Tensor, mask: Tensor) -> Tensor:
        """Maps queries (B, Q, D) and regions (B, R, D) to queries; mask is (B, 1, 1, R + Q)."""
        num_regions = regions.shape[1]
        read = torch.cat([self.region_norm(regions), self.query_norm(queries)], dim=1)
        query, key, value = blocks.split_heads(self.qkv(read), self.num_heads)
        queries = queries + self.out(blocks.attend(query[:, :, num_regions:], key, value, mask))
        added: Tensor = self.down(F.gelu(self.up(self.norm(queries))))
        return queries + added


class Resampler(nn.Module):
    """As many visual tokens as learned queries, whatever the number of regions.

    The Perceiver resampler of Flamingo (arXiv:2204.14198, 3.1).
    """

    def __init__(
        self,
        feature_dim: int,
        width: int,
        num_queries: int,
        num_layers: int,
        num_heads: int,
        intermediate_size: int,
    ) -> None:
        super().__init__()
        self.project = blocks.FeatureLinear(feature_dim, width)
        self.queries = nn.Embedding(num_queries, width)
        self.layers = nn.ModuleList(
            ResamplerLayer(width, num_heads, intermediate_size) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width, eps=blocks.LAYER_NORM_EPS)

    def forward(self, features: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Maps features (B, R, F) and bool padding (B, R) to (B, Q, D) and padding (B, Q).

        Of an image without regions all queries are padding; where no image has any, Q is 0.
        """
        regions: Tensor = self.project(features)
        num_queries = self.queries.num_embeddings if features.shape[1] else 0
        numbers = torch.arange(num_queries, device=features.device)
        queries: Tensor = self.queries(numbers.expand(len(features), -1))
        mask = full_mask(F.pad(padding, (0, num_queries), value=False))
        for layer in self.layers:
            queries = layer(queries, regions, mask)
        unseen = padding.all(dim=1, keepdim=True).expand(-1, num_queries)
        return self.norm(queries), unseen
