"""The blocks of which every family is composed: embeddings, attention, feed-forward, heads.

Each parameter belongs to one Linear, LayerNorm or Embedding and is read only in that module's own
forward, which is what a sharded optimizer (ZeRO-3) needs to gather it in time. Shapes are written
with B samples, S positions, T tokens, R regions, D width, H heads, d = D / H.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pipeline.models.packed import PackedLayout

LAYER_NORM_EPS = 1e-12  # BERT's, and that of every family here


class Heads(NamedTuple):
    """One attention's projections, (B, H, S, d) each."""

    query: Tensor
    key: Tensor
    value: Tensor


def split_heads(projected: Tensor, num_heads: int) -> Heads:
    """Splits queries, keys and values that one Linear made: (B, S, 3 * D) to three (B, H, S, d)."""
    head_width = projected.shape[-1] // (3 * num_heads)
    heads = projected.view(*projected.shape[:2], 3, num_heads, head_width).permute(2, 0, 3, 1, 4)
    return Heads(*heads.unbind(0))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Returns what each query reads, (B, S, D). `mask` broadcasts to (B, H, S, L), True = visible.

    A query that may see nothing reads zeros. Unless told otherwise, scores are divided by sqrt(d).
    """
    read = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale
    )
    return read.transpose(1, 2).flatten(2)


def attention_map(query: Tensor, key: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Returns the weights (B, H, S, L) with which `attend` reads these keys, before dropout."""
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = scale * (query @ key.transpose(-1, -2))
    # Not -inf: a query that may see nothing would have NaN gradients even where its weights are 0.
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) * mask


def joint_map(
    text_text: Tensor, text_regions: Tensor, regions_text: Tensor, regions_regions: Tensor
) -> Tensor:
    """Lays four maps, named query then key, side by side: (B, H, T+R, T+R), text first."""
    text = torch.cat([text_text, text_regions], dim=-1)
    return torch.cat([text, torch.cat([regions_text, regions_regions], dim=-1)], dim=-2)


def co_attend(
    text: Heads,
    regions: Heads,
    text_layout: PackedLayout,
    region_layout: PackedLayout,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Returns what text reads of regions and regions of text, packed as they are."""
    read = attend(text.query, regions.key, regions.value, region_layout.mask, dropout)
    seen = attend(regions.query, text.key, text.value, text_layout.mask, dropout)
    return text_layout.pack(read), region_layout.pack(seen)


class SelfAttention(nn.Module):
    """Attention, residual, norm (BERT, arXiv:1810.04805)."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(
        self, states: Tensor, layout: PackedLayout, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Heads]:
        """Maps states, as `layout` packs them, to the same shape, and returns the heads.

        `past` holds keys and values (B, H, P, d) that stand before the states' own; the mask then
        covers P + S positions.
        """
        query, key, value = split_heads(layout.pad(self.qkv(states)), self.num_heads)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        read = attend(query, key, value, layout.mask, self.dropout if self.training else 0.0)
        added = F.dropout(self.out(layout.pack(read)), self.dropout, self.training)
        return self.norm(states + added), Heads(query, key, value)


class CrossAttention(nn.Module):
    """Text reads regions and regions read text through the same weights (LXMERT, 1908.07490, 2.2).

    The paper writes two sets of weights; its code, and so the published weights, have one.
    """

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(
        self, text: Tensor, regions: Tensor, text_layout: PackedLayout, region_layout: PackedLayout
    ) -> tuple[Tensor, Tensor, Heads, Heads]:
        """Maps text and regions, each as its layout packs it, to the same shapes.

        Also returns both's heads. Everything sees all that is not padding of the other.
        """
        text_heads = split_heads(text_layout.pad(self.qkv(text)), self.num_heads)
        region_heads = split_heads(region_layout.pad(self.qkv(regions)), self.num_heads)
        read, seen = co_attend(
            text_heads,
            region_heads,
            text_layout,
            region_layout,
            self.dropout if self.training else 0.0,
        )
        text = self.norm(text + F.dropout(self.out(read), self.dropout, self.training))
        regions = self.norm(regions + F.dropout(self.out(seen), self.dropout, self.training))
        return text, regions, text_heads, region_heads


class CoAttention(nn.Module):
    """Two streams of different widths read each other (ViLBERT, arXiv:1908.02265, 3.1).

    `width` is that of the attention between them. The frozen `unused_*` maps are in every published
    file although no output passes through them.
    """

    def __init__(
        self, text_width: int, region_width: int, width: int, num_heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.text_qkv = nn.Linear(text_width, 3 * width)
        self.text_out = nn.Linear(width, text_width)
        self.text_norm = nn.LayerNorm(text_width, eps=LAYER_NORM_EPS)
        self.region_qkv = nn.Linear(region_width, 3 * width)
        self.region_out = nn.Linear(width, region_width)
        self.region_norm = nn.LayerNorm(region_width, eps=LAYER_NORM_EPS)
        self.unused_text = nn.Linear(width, text_width).requires_grad_(False)
        self.unused_region = nn.Linear(width, region_width).requires_grad_(False)

    def forward(
        self, text: Tensor, regions: Tensor, text_layout: PackedLayout, region_layout: PackedLayout
    ) -> tuple[Tensor, Tensor, Heads, Heads]:
        """As CrossAttention.forward, with regions of a width of their own."""
        text_heads = split_heads(text_layout.pad(self.text_qkv(text)), self.num_heads)
        region_heads = split_heads(region_layout.pad(self.region_qkv(regions)), self.num_heads)
        read, seen = co_attend(
            text_heads,
            region_heads,
            text_layout,
            region_layout,
            self.dropout if self.training else 0.0,
        )
        read = F.dropout(self.text_out(read), self.dropout, self.training)
        seen = F.dropout(self.region_out(seen), self.dropout, self.training)
        return (
            self.text_norm(text + read),
            self.region_norm(regions + seen),
            text_heads,
            region_heads,
        )


class FeedForward(nn.Module):
    """Two linear maps with a GELU between, residual, norm."""

    def __init__(self, width: int, intermediate_size: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.up = nn.Linear(width, intermediate_size)
        self.down = nn.Linear(intermediate_size, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, states: Tensor) -> Tensor:
        """Maps states (..., D) to the same shape."""
        added = F.dropout(self.down(F.gelu(self.up(states))), self.dropout, self.training)
        normed: Tensor = self.norm(states + added)
        return normed


class TransformerLayer(nn.Module):
    """BERT's layer: self-attention, then feed-forward, each with its norm after the residual."""

    def __init__(self, width: int, num_heads: int, intermediate_size: int, dropout: float) -> None:
        super().__init__()
        self.attention = SelfAttention(width, num_heads, dropout)
        self.feed_forward = FeedForward(width, intermediate_size, dropout)

    def forward(
        self, states: Tensor, layout: PackedLayout, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Heads]:
        """As SelfAttention.forward."""
        states, heads = self.attention(states, layout, past)
        return self.feed_forward(states), heads


class TextEmbeddings(nn.Module):
    """Word, position and segment embeddings, summed; the family applies its norm and dropout.

    Every token belongs to segment 0.
    """

    def __init__(
        self, vocab_size: int, max_positions: int, type_vocab_size: int, width: int
    ) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(max_positions, width)
        self.token_type = nn.Embedding(type_vocab_size, width)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Maps tokens (B, T) and positions (T,) or (B, T) to (B, T, D)."""
        segment = self.token_type(torch.zeros_like(tokens))
        summed: Tensor = self.word(tokens) + self.position(positions) + segment
        return summed


def to_float(features: Tensor) -> Tensor:
    """Maps uint8 pixels to [-1, 1], as (x / 255 - 0.5) / 0.5; leaves floats as they are."""
    return features.float() / 127.5 - 1.0 if features.dtype == torch.uint8 else features


class FeatureLinear(nn.Linear):
    """A Linear that reads floats of any precision in that of its weight."""

    def forward(self, features: Tensor) -> Tensor:
        """Maps (B, R, F) to (B, R, D)."""
        return super().forward(features.to(self.weight.dtype))


def fourier_boxes(boxes: Tensor, num_features: int) -> Tensor:
    """Returns sines and cosines of box coordinates, (B, R, num_features), for boxes (B, R, 4).

    `num_features` is a multiple of 8: four coordinates, sine and cosine, each frequency twice the
    one before, from half a wave over the image.
    """
    frequencies = math.pi * 2.0 ** torch.arange(num_features // 8, device=boxes.device)
    angles = (boxes.float().unsqueeze(-1) * frequencies).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class RegionEmbeddings(nn.Module):
    """Region features and box, each projected and normed, averaged (LXMERT, 1908.07490, 2.1)."""

    def __init__(self, feature_dim: int, width: int) -> None:
        super().__init__()
        self.feature = FeatureLinear(feature_dim, width)
        self.feature_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.box = FeatureLinear(4, width)
        self.box_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        """Maps features (B, R, F) and boxes (B, R, 4) to (B, R, D)."""
        seen: Tensor = self.feature_norm(self.feature(to_float(features)))
        placed: Tensor = self.box_norm(self.box(boxes))
        return (seen + placed) / 2


def masked_mean(states: Tensor, padding: Tensor) -> Tensor:
    """Returns the mean of what is not padding, (B, S, D) to (B, D); of nothing it is zeros."""
    kept = (~padding).unsqueeze(-1).to(states.dtype)
    return (states * kept).sum(1) / kept.sum(1).clamp(min=1)


def states_from_end(states: Tensor, token_padding: Tensor, back: int) -> Tensor:
    """Picks the state `back` before the end of each text: (B, S, D) to (B, D), text first.

    `back` is 1 for the last real token. `token_padding` is (B, T).
    """
    index = (~token_padding).sum(1) - back
    return states[torch.arange(len(states), device=states.device), index]


class Pooler(nn.Module):
    """Reads one state as the summary of a sequence: a linear map and tanh (BERT)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, state: Tensor) -> Tensor:
        """Maps (B, D) to (B, D)."""
        return torch.tanh(self.dense(state))


class HeadTransform(nn.Module):
    """What BERT puts before a decoder: a linear map, GELU, norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, states: Tensor) -> Tensor:
        """Maps (N, D) to (N, D)."""
        normed: Tensor = self.norm(F.gelu(self.dense(states)))
        return normed


class TokenHead(nn.Module):
    """Scores every word at a position; the decoder's weight is the word embedding itself.

    Sharing the Parameter, rather than reading the embedding's, makes it one of the decoder's own:
    ZeRO-3 then gathers it for both modules.
    """

    def __init__(self, word: nn.Embedding) -> None:
        super().__init__()
        self.transform = HeadTransform(word.embedding_dim)
        self.decoder = nn.Linear(word.embedding_dim, word.num_embeddings)
        self.decoder.weight = word.weight

    def forward(self, states: Tensor) -> Tensor:
        """Maps (N, D) to (N, V) logits."""
        logits: Tensor = self.decoder(self.transform(states))
        return logits


class AnswerHead(nn.Module):
    """Scores answers from a pooled state, with one hidden layer of twice its width."""

    def __init__(self, width: int, num_answers: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(2 * width, eps=LAYER_NORM_EPS)
        self.out = nn.Linear(2 * width, num_answers)

    def forward(self, pooled: Tensor) -> Tensor:
        """Maps (B, D) to (B, A) logits."""
        logits: Tensor = self.out(self.norm(F.gelu(self.up(pooled))))
        return logits


def initialise(model: nn.Module, deviation: float) -> None:
    """Draws initial weights as BERT does: normal, with zero biases. The caller seeds."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=deviation)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
