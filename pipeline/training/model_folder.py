"""A trained model as others open it: a folder in the Hugging Face layout.

    config.json  model.safetensors  tokenizer.json …   what `transformers` reads
    backbone.safetensors                               the network that it sees with, if its own
    sightline.json                                     answers, extractor card, data version
    README.md                                          the model card

`sightline.json` is written last: a folder that has it is whole.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import safetensors.torch
from torch import Tensor, nn

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
from pipeline.models.live import BACKBONE, LiveModel
from pipeline.training.model_card import ModelCard
from pipeline.vision.backbone import NETWORK
from pipeline.vision.live import backbone_config
from pipeline.vision.weights import assign, load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAGE = "README.md"
# A state dict with torchvision's names: `weights` of a grid extractor, whose features are the same.
BACKBONE_WEIGHTS = "backbone.safetensors"
_NETWORK = f"{BACKBONE}.{NETWORK}."  # before its names, in those of the whole model


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
    card: ModelCard,
) -> None:
    """Writes a model folder. `tokenizer` is the folder or vocab.txt whose files are copied."""
    document, tensors = families.to_saved(config, parameters, answers)
    storage.write_bytes(storage.join(folder, CONFIG), _json(document))
    storage.write_bytes(storage.join(folder, WEIGHTS), _safetensors(tensors))
    network = {
        name.removeprefix(_NETWORK): parameter.detach().contiguous()
        for name, parameter in parameters.items()
        if name.startswith(_NETWORK)
    }
    if network:
        storage.write_bytes(storage.join(folder, BACKBONE_WEIGHTS), _safetensors(network))
    for name, payload in _tokenizer_files(tokenizer).items():
        storage.write_bytes(storage.join(folder, name), payload)
    storage.write_bytes(storage.join(folder, PAGE), card.page().encode())
    own = {**card.made, "answers": list(answers), "sightline": __version__}
    storage.write_bytes(storage.join(folder, OWN), _json(own))


def load_model(folder: str) -> ModelFolder:
    """Opens a model folder of ours, or raises ModelError saying what is missing or damaged."""
    document, tensors = read_weights(folder)
    card = read_own(folder)
    model, _ = families.from_saved(document, tensors, backbone=_backbone(folder, card))
    answers = tuple(card.pop("answers"))
    return ModelFolder(model.eval(), load_tokenizer(folder), answers, card)


def initialise(model: VisionLanguageModel, location: str, fresh: Sequence[str] = ()) -> LoadReport:
    """Takes over weights, and raises ModelError naming each that is missing or does not fit.

    From a folder: ours, BERT's, a decoder's, or another in the HF layout; or from one file of a
    family's authors. `fresh` names modules that keep their initialisation whatever is there. A
    folder's backbone is taken over by a model that has one.
    """
    backbone = storage.join(location, BACKBONE_WEIGHTS)
    if isinstance(model, LiveModel) and storage.exists(backbone):
        assign(model.backbone.get_submodule(NETWORK), load(backbone), backbone)
    if is_original(location):
        return families.load_weights(model, read_original(location), "original", fresh)
    document, tensors = read_weights(location)
    return families.load_weights(model, tensors, families.layout_of(model, document), fresh)


def _backbone(folder: str, card: Mapping[str, Any]) -> nn.Module | None:
    """Returns the network that a model sees with, if it has one of its own."""
    network = backbone_config(card.get("extractor") or {})
    if network is None:
        return None
    weights = storage.join(folder, BACKBONE_WEIGHTS)
    return network.model_copy(update={"weights": weights}).backbone()


def _safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save(dict(tensors), metadata={"format": "pt"})


def _tokenizer_files(location: str) -> dict[str, bytes]:
    names = storage.list_names(location)
    if not names:  # a vocab.txt by itself
        return {"vocab.txt": storage.read_bytes(location)}
    return {name: storage.read_bytes(storage.join(location, name)) for name in names}


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=2, ensure_ascii=False).encode()
