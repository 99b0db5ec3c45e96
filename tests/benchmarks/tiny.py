"""A VisualBERT small enough to predict with in a test."""

import torch

from pipeline.models.visualbert import VisualBert, VisualBertConfig
from tests.data.tiny_dataset import grid_values

FEATURE_DIM = grid_values(0).shape[1]


def make_model(vocab_size: int, num_answers: int = 0) -> VisualBert:
    """Returns a model whose weights are spread enough that different inputs differ."""
    torch.manual_seed(4)
    model = VisualBert(
        VisualBertConfig(
            vocab_size=vocab_size,
            width=16,
            num_layers=2,
            num_heads=2,
            intermediate_size=24,
            feature_dim=FEATURE_DIM,
            max_positions=32,
            num_answers=num_answers,
        )
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.5)
    return model.eval()
