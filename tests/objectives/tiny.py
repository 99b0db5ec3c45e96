"""A micro-batch of six captioned, questioned pictures, and models small enough to test."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pipeline.data.load.loader import Batch
from pipeline.data.read.features import FeatureBatch
from pipeline.data.sample import Question, Texts
from pipeline.data.text.vocabulary import build_tokenizer
from pipeline.models.base import VisionLanguageModel
from pipeline.models.families import FAMILIES, build
from pipeline.models.tensors import mapped
from pipeline.models.visualbert import VisualBert, VisualBertConfig
from pipeline.objectives.base import Objective
from pipeline.objectives.objective import ObjectivesConfig, by_stream
from pipeline.objectives.stream import CollatedBatch, StreamCollator

WORDS = "a red dog runs past the blue cat while two green birds sit on one grey wall".split
FEATURE_DIM, MAX_REGIONS = 7, 5
NUM_CLASSES, NUM_ATTRIBUTES = 9, 8
ANSWERS = ["yes", "no", "red"]


def make_texts(number: int) -> Texts:
    words = WORDS()
    return Texts(
        image_id=100 + number,
        captions=(" ".join(words[: 2 + 2 * number]), " ".join(words[number:][:4])),
        questions=(
            Question(
                question_id=1000 + number,
                question=f"is the {words[number + 1]} {'very ' * number}big?",
                answers=("yes",) * (10 - number) + ("red",) * number,
                question_type="is the",
                answer_type="yes/no" if number % 2 else "other",
            ),
        ),
    )


def make_batch(size: int = 6, step: int = 3, first: int = 0) -> Batch:
    """Examples with `number` regions more than one each, and captions of growing length."""
    numbers = range(first, first + size)
    rng = np.random.default_rng(5)
    values = rng.standard_normal((16, MAX_REGIONS, FEATURE_DIM)).astype(np.float32)
    classes = rng.dirichlet([0.2] * NUM_CLASSES, (16, MAX_REGIONS)).astype(np.float32)
    attributes = rng.dirichlet([0.2] * NUM_ATTRIBUTES, (16, MAX_REGIONS)).astype(np.float32)
    boxes = rng.random((16, MAX_REGIONS, 4)).astype(np.float32)
    num_regions = np.array([1 + number % MAX_REGIONS for number in numbers], np.int32)
    width = int(num_regions.max())
    kept = np.arange(width) < num_regions[:, None]
    rows = list(numbers)
    return Batch(
        keys=[f"sample-{number}" for number in numbers],
        rows=np.array(rows),
        positions=np.array(rows),
        texts=[make_texts(number) for number in numbers],
        text_index=np.zeros(size, np.int64),
        distractors=[make_texts((number + 1) % 7) for number in numbers],
        features=FeatureBatch(
            np.where(kept[..., None], values[rows, :width], 0),
            np.where(kept[..., None], boxes[rows, :width], 0),
            num_regions,
            np.where(kept[..., None], classes[rows, :width], 0),
            np.where(kept[..., None], attributes[rows, :width], 0),
        ),
        step=step,
        seed=11,
    )


def part(batch: Batch, indices: Sequence[int]) -> Batch:
    """These examples of a batch, as a batch of their own, whose regions stay padded as they are."""
    assert batch.features is not None
    of_features = {
        name: array[list(indices)]
        for name, array in vars(batch.features).items()
        if array is not None
    }
    return replace(
        batch,
        keys=[batch.keys[index] for index in indices],
        rows=batch.rows[list(indices)],
        positions=batch.positions[list(indices)],
        texts=[batch.texts[index] for index in indices],
        text_index=batch.text_index[list(indices)],
        distractors=[batch.distractors[index] for index in indices],
        features=replace(batch.features, **of_features),
    )


def tensors(value: Any) -> list[torch.Tensor]:
    """Every tensor of a collated batch, in the order of its fields."""
    found: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    mapped(value, keep)
    return found


def with_texts(batch: Batch, texts: Sequence[Texts], **changes: Any) -> Batch:
    return replace(batch, texts=list(texts), **changes)


def make_tokenizer() -> Any:
    return build_tokenizer([*make_texts(6).captions, "is the very big? yes no"], 120)


def make_model(vocab_size: int, num_answers: int = len(ANSWERS)) -> VisualBert:
    torch.manual_seed(0)
    config = VisualBertConfig(
        vocab_size=vocab_size,
        width=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=24,
        feature_dim=FEATURE_DIM,
        max_positions=32,
        num_answers=num_answers,
    )
    return VisualBert(config).eval()


SIZES: dict[str, dict[str, Any]] = {
    "visualbert": {"num_layers": 2},
    "lxmert": {
        "text_layers": 2,
        "region_layers": 1,
        "cross_layers": 2,
        "num_objects": NUM_CLASSES,
        "num_attributes": NUM_ATTRIBUTES,
    },
    "vilbert": {
        "text_layers": 2,
        "region_width": 12,
        "region_heads": 3,
        "region_layers": 2,
        "region_intermediate_size": 20,
        "co_width": 18,
        "co_heads": 3,
        "text_connections": (0, 1),
        "region_connections": (0, 1),
        "num_objects": NUM_CLASSES,
    },
    "uniter": {"num_layers": 2, "num_objects": NUM_CLASSES},
    "late_fusion": {"text_layers": 2, "region_layers": 1},
    "attention_fusion": {"text_layers": 2, "region_layers": 1},
    "visual_prefix": {
        "decoder": {
            "model_type": "gpt2",
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 64,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }
    },
}


def make_family(family: str, vocab_size: int, **changes: Any) -> VisionLanguageModel:
    """A model of two layers, which draws its weights from seed 0 and drops nothing."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": vocab_size,
        "width": 16,
        "num_heads": 2,
        "intermediate_size": 24,
        "feature_dim": FEATURE_DIM,
        "max_positions": 32,
        "num_answers": len(ANSWERS),
        "dropout": 0.0,
        **SIZES[family],
        **changes,
    }
    return build(FAMILIES[family].config(**sizes)).eval()


def make_objectives(**settings: Any) -> list[Objective]:
    return ObjectivesConfig.model_validate(settings).build()


def collated(
    objectives: list[Objective], tokenizer: Any, batch: Batch, blind: bool = False
) -> CollatedBatch:
    return CollatedBatch(
        {
            name: StreamCollator(group, tokenizer, 24, ANSWERS, 7 if blind else None)(batch)
            for name, group in by_stream(objectives).items()
        }
    )
