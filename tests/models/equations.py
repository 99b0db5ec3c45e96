"""The published equations, written out plainly: references for families that transformers lacks."""

import math

import torch
from torch import Tensor


class Equations:
    """What BERT's descendants share, for one sample, over tensors as published files name them.

    It is written from the papers and shares no code with the package, nor with torch's own layers.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return scaled * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    @staticmethod
    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    @staticmethod
    def attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
        """Reads with each head in turn; (S, D), (L, D), (L, D) to (S, D)."""
        size = query.shape[1] // num_heads
        read = []
        for head in range(num_heads):
            part = slice(head * size, (head + 1) * size)
            weights = (query[:, part] @ key[:, part].T / math.sqrt(size)).softmax(-1)
            read.append(weights @ value[:, part])
        return torch.cat(read, dim=1)

    def layer(self, name: str, x: Tensor, num_heads: int) -> Tensor:
        heads = [
            self.linear(f"{name}.attention.self.{part}", x) for part in ("query", "key", "value")
        ]
        read = self.linear(
            f"{name}.attention.output.dense",
            self.attention(heads[0], heads[1], heads[2], num_heads),
        )
        x = self.norm(f"{name}.attention.output.LayerNorm", read + x)
        inner = self.gelu(self.linear(f"{name}.intermediate.dense", x))
        return self.norm(f"{name}.output.LayerNorm", self.linear(f"{name}.output.dense", inner) + x)

    def text(self, embeddings: str, tokens: Tensor) -> Tensor:
        """Embeds tokens (T,) of segment 0 to (T, D)."""
        table = {
            name: self.tensors[f"{embeddings}.{name}_embeddings.weight"]
            for name in ("word", "position", "token_type")
        }
        summed = table["word"][tokens] + table["position"][: len(tokens)] + table["token_type"][0]
        return self.norm(f"{embeddings}.LayerNorm", summed)
