"""Tiny batches, configs and folders for the model tests; every axis has a size of its own."""

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.models.attention_fusion import AttentionFusionConfig
from pipeline.models.inputs import Inputs
from pipeline.models.late_fusion import LateFusionConfig
from pipeline.models.lxmert import LxmertConfig
from pipeline.models.uniter import UniterConfig
from pipeline.models.vilbert import VilbertConfig
from pipeline.models.visual_prefix import VisualPrefixConfig
from pipeline.models.visualbert import VisualBert, VisualBertConfig

WORDS = 29  # V
WIDTH = 24  # D
FEATURES = 11  # F
ANSWERS = 7  # A
OBJECTS = 13
ATTRIBUTES = 9


TEXT_SIDE = {
    "vocab_size": WORDS,
    "width": WIDTH,
    "num_heads": 3,
    "intermediate_size": 20,
    "feature_dim": FEATURES,
    "max_positions": 17,
    "num_answers": ANSWERS,
    "dropout": 0.0,
}


def visualbert_config(**changes: object) -> VisualBertConfig:
    return VisualBertConfig.model_validate({**TEXT_SIDE, "num_layers": 2, **changes})


def visualbert(**changes: object) -> VisualBert:
    return randomise(VisualBert(visualbert_config(**changes)))


def transformers_visualbert_config(**changes: object) -> transformers.VisualBertConfig:
    """The same sizes, as transformers calls them."""
    return transformers.VisualBertConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        visual_embedding_dim=FEATURES,
        max_position_embeddings=17,
        num_labels=ANSWERS,
        **changes,
    )


def uniter_config(**changes: object) -> UniterConfig:
    return UniterConfig.model_validate(
        {**TEXT_SIDE, "num_layers": 2, "num_objects": OBJECTS, **changes}
    )


def lxmert_config(**changes: object) -> LxmertConfig:
    sizes = {"text_layers": 3, "region_layers": 2, "cross_layers": 2}
    heads = {"num_objects": OBJECTS, "num_attributes": ATTRIBUTES}
    return LxmertConfig.model_validate({**TEXT_SIDE, **sizes, **heads, **changes})


def vilbert_config(**changes: object) -> VilbertConfig:
    return VilbertConfig.model_validate(
        {
            **TEXT_SIDE,
            "text_layers": 4,
            "region_width": 16,
            "region_heads": 2,
            "region_layers": 2,
            "region_intermediate_size": 12,
            "co_width": 28,
            "co_heads": 4,
            "text_connections": (2, 3),
            "region_connections": (0, 1),
            "num_objects": OBJECTS,
            **changes,
        }
    )


def late_fusion_config(**changes: object) -> LateFusionConfig:
    return LateFusionConfig.model_validate(
        {**TEXT_SIDE, "text_layers": 2, "region_layers": 1, **changes}
    )


def attention_fusion_config(**changes: object) -> AttentionFusionConfig:
    return AttentionFusionConfig.model_validate(
        {**TEXT_SIDE, "text_layers": 2, "region_layers": 1, **changes}
    )


GPT2 = {
    "model_type": "gpt2",
    "n_embd": WIDTH,
    "n_head": 4,
    "n_layer": 3,
    "n_positions": 80,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2_STILL = {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LLAMA = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}


def visual_prefix_config(**changes: object) -> VisualPrefixConfig:
    return VisualPrefixConfig.model_validate(
        {**TEXT_SIDE, "decoder": GPT2_STILL, "position_fourier": 8, **changes}
    )


def batch(
    text_lengths: tuple[int, ...] = (6, 4), region_counts: tuple[int, ...] = (5, 3)
) -> Inputs:
    """Rows of random content, padded to the longest; what padding holds is random too."""
    generator = torch.Generator().manual_seed(5)
    num_rows, tokens, regions = len(text_lengths), max(text_lengths), max(region_counts)
    corners = torch.rand(num_rows, regions, 4, generator=generator)
    return Inputs(
        tokens=torch.randint(1, WORDS, (num_rows, tokens), generator=generator),
        token_padding=torch.arange(tokens) >= torch.tensor(text_lengths)[:, None],
        features=torch.randn(num_rows, regions, FEATURES, generator=generator),
        boxes=torch.cat([corners[..., :2] / 2, 0.5 + corners[..., 2:] / 2], dim=-1),
        region_padding=torch.arange(regions) >= torch.tensor(region_counts)[:, None],
    )


def row(inputs: Inputs, index: int) -> Inputs:
    """One row alone, without its padding."""
    tokens = ~inputs.token_padding[index]
    regions = ~inputs.region_padding[index]
    return Inputs(
        tokens=inputs.tokens[index, tokens][None],
        token_padding=inputs.token_padding[index, tokens][None],
        features=inputs.features[index, regions][None],
        boxes=inputs.boxes[index, regions][None],
        region_padding=inputs.region_padding[index, regions][None],
    )


def assert_close(found: Tensor, expected: Tensor) -> None:
    """The project's bound for agreement with a reference in fp32."""
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def randomise(model: ModuleT, seed: int = 2) -> ModuleT:
    """Draws every parameter, biases and norms too, so that each one is seen to matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval()


def save(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes a folder that transformers can open."""
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads the config and tensors of a folder that transformers wrote."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config, load_file(str(folder / "model.safetensors"))
