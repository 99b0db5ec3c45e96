"""A trained model as others open it: a folder in the Hugging Face layout.

    config.json  model.safetensors  tokenizer.json …   what `transformers` reads
    sightline.json                                     answers, extractor card, data version
    README.md                                          the model card

`sightline.json` is written last: a folder that has it is whole.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import safetensors.torch
from torch import Tensor

from pipeline import __version__, storage
from pipeline.data.vocabulary import load_tokenizer
from pipeline.model_files import (
    CONFIG,
    OWN,
    WEIGHTS,
    is_original,
    read_original,
    read_own,
    read_weights,
)
from pipeline.models import families
from pipeline.models.base import ModelConfig, VisionLanguageModel
from pipeline.models.layouts import LoadReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class ModelFolder:
    """A model with all that is needed to use it. `card` is what `sightline.json` records."""

    model: VisionLanguageModel
    tokenizer: "PreTrainedTokenizerFast"
    answers: tuple[str, ...]
    card: Mapping[str, Any]


def save_model(
    folder: str,
    *,
    config: ModelConfig,
    parameters: Mapping[str, Tensor],
    tokenizer: str,
    answers: Sequence[str],
    card: Mapping[str, Any],
) -> None:
    """Writes a model folder. `tokenizer` is the folder or vocab.txt whose files are copied."""
    document, tensors = families.to_saved(config, parameters, answers)
    storage.write_bytes(storage.join(folder, CONFIG), _json(document))
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    storage.write_bytes(storage.join(folder, WEIGHTS), weights)
    for name, payload in _tokenizer_files(tokenizer).items():
        storage.write_bytes(storage.join(folder, name), payload)
    storage.write_bytes(storage.join(folder, "README.md"), _readme(document, card).encode())
    own = {**card, "answers": list(answers), "sightline": __version__}
    storage.write_bytes(storage.join(folder, OWN), _json(own))


def load_model(folder: str) -> ModelFolder:
    """Opens a model folder of ours, or raises ModelError saying what is missing or damaged."""
    document, tensors = read_weights(folder)
    model, _ = families.from_saved(document, tensors)
    card = read_own(folder)
    answers = tuple(card.pop("answers"))
    return ModelFolder(model.eval(), load_tokenizer(folder), answers, card)


def initialise(model: VisionLanguageModel, location: str, fresh: Sequence[str] = ()) -> LoadReport:
    """Takes over weights, and raises ModelError naming each that is missing or does not fit.

    From a folder: ours, BERT's, a decoder's, or another in the HF layout; or from one file of a
    family's authors. `fresh` names modules that keep their initialisation whatever is there.
    """
    if is_original(location):
        return families.load_weights(model, read_original(location), "original", fresh)
    document, tensors = read_weights(location)
    return families.load_weights(model, tensors, families.layout_of(model, document), fresh)


def _tokenizer_files(location: str) -> dict[str, bytes]:
    names = storage.list_names(location)
    if not names:  # a vocab.txt by itself
        return {"vocab.txt": storage.read_bytes(location)}
    return {name: storage.read_bytes(storage.join(location, name)) for name in names}


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=2, ensure_ascii=False).encode()


def _readme(document: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    """A model card: what made this model, for a reader who has only the folder."""
    data = card.get("data", {})
    extractor = card.get("extractor") or {}
    training = card.get("training", {})
    rows = {
        "family": document["model_type"],
        "phase": card.get("phase", ""),
        "dataset": PurePosixPath(str(data.get("dataset", ""))).name,
        "dataset version": data.get("version", ""),
        "visual features": f"{extractor.get('type', 'none')} ({extractor.get('identity', '')})",
        "steps": training.get("steps", ""),
        "global batch": training.get("global_batch_size", ""),
        "learning rate": training.get("learning_rate", ""),
        "seed": card.get("seed", ""),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: transformers
tags: [vision-language, {document["model_type"]}]
---
# A vision–language model trained with Sightline {__version__}

| | |
|---|---|
{table}

Use it: `sightline predict MODEL --image photo.jpg --question "What is this?"`.
`transformers` opens the folder too; give it features as its extractor, described in
`{OWN}`, makes them. With `position_fourier` in `{CONFIG}`, each region's features end in that
many sines and cosines of its box.

It knows what its training data showed it and no more: expect it to be wrong, and to repeat that
data's biases, elsewhere.
"""
