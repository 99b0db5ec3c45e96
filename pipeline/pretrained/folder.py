"""A trained model as others open it: a folder in the Hugging Face layout.

    config.json  model.safetensors  tokenizer.json …   what `transformers` reads
    generation_config.json                             how it writes, as it was scored
    backbone.safetensors                               the network that it sees with, if its own
    sightline.json                                     answers, extractor card, data version
    README.md                                          the model card

`sightline.json` is written last: a folder that has it is whole.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import safetensors.torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from pipeline import __version__, storage
from pipeline.data.read.extractor_card import ExtractorCard
from pipeline.data.text.vocabulary import load_tokenizer
from pipeline.errors import ConfigError, FeatureError, ModelError, StorageError
from pipeline.models import families
from pipeline.models.base import BACKBONE, ModelConfig, VisionLanguageModel
from pipeline.models.generation import Decoding
from pipeline.models.layouts import LoadReport
from pipeline.pretrained.card import ModelCard
from pipeline.pretrained.files import (
    CONFIG,
    OWN,
    WEIGHTS,
    extractor_of,
    is_model,
    is_original,
    read_json,
    read_original,
    read_own,
    read_weights,
    require_unchanged,
    with_digests,
)
from pipeline.vision.extractors.backbone import NETWORK
from pipeline.vision.extractors.live import backbone_config
from pipeline.vision.extractors.weights import assign, load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAGE = "README.md"
GENERATION = "generation_config.json"
# A state dict with torchvision's names: `weights` of a grid extractor, whose features are the same.
BACKBONE_WEIGHTS = "backbone.safetensors"
_NETWORK = f"{BACKBONE}.{NETWORK}."  # before its names, in those of the whole model


@dataclass(frozen=True)
class ModelFolder:
    """A model with all that is needed to use it. `card` is what `sightline.json` records.

    `decoding` is how the texts were written that it was scored by; None if it was not scored.
    """

    model: VisionLanguageModel
    tokenizer: "PreTrainedTokenizerFast"
    answers: tuple[str, ...]
    card: Mapping[str, Any]
    decoding: Decoding | None


def save_model(
    folder: str,
    *,
    config: ModelConfig,
    parameters: Mapping[str, Tensor],
    tokenizer: str,
    answers: Sequence[str],
    card: ModelCard,
    decoding: Decoding | None = None,
) -> None:
    """Writes a model folder. `tokenizer` is the folder or vocab.txt whose files are copied."""
    document, tensors = families.to_saved(config, parameters, answers)
    network = {
        name.removeprefix(_NETWORK): parameter.detach().contiguous()
        for name, parameter in parameters.items()
        if name.startswith(_NETWORK)
    }
    files = {
        CONFIG: _json(document),
        WEIGHTS: _safetensors(tensors),
        **({BACKBONE_WEIGHTS: _safetensors(network)} if network else {}),
        **_tokenizer_files(tokenizer),
    }
    for name, payload in files.items():
        storage.write_bytes(storage.join(folder, name), payload)
    if decoding is not None:
        save_decoding(folder, decoding)
    storage.write_bytes(storage.join(folder, PAGE), card.page().encode())
    own = {**card.made, "answers": list(answers), "sightline": __version__}
    storage.write_bytes(storage.join(folder, OWN), _json(with_digests(own, files)))


def save_decoding(folder: str, decoding: Decoding) -> None:
    """Notes beside a model how it wrote the texts that it is scored by, as transformers reads it.

    Not among the files with a digest: a later evaluation may write in another way.
    """
    renamed = {_NAMES.get(key, key): value for key, value in asdict(decoding).items()}
    storage.write_bytes(storage.join(folder, GENERATION), _json({"do_sample": False, **renamed}))


def _read_decoding(folder: str) -> Decoding | None:
    location = storage.join(folder, GENERATION)
    if not storage.exists(location):
        return None
    document = read_json(location)
    given = {name: document.get(_NAMES.get(name, name)) for name in asdict(Decoding(1))}
    try:
        return _DECODING.validate_json(json.dumps(given), strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        name = str(fault["loc"][0]) if fault["loc"] else next(iter(given))
        raise ModelError(
            f"{location}: {_NAMES.get(name, name)} is {str(given[name])[:60]!r}; {fault['msg']}"
        ) from None


_NAMES = {"beams": "num_beams"}  # our setting to transformers'
_DECODING = TypeAdapter(Decoding)


def load_model(folder: str) -> ModelFolder:
    """Opens a model folder of ours, or raises ModelError saying what is missing or damaged."""
    card = read_own(folder)
    decoding = _read_decoding(folder)
    document, tensors = read_weights(folder)
    try:
        families.check_document(document)
        require_unchanged(folder, card)
        extractor = extractor_of(card)
        backbone = _backbone(folder, extractor)
    except ModelError as error:
        raise ModelError(_placed(folder, error)) from error
    try:
        model, _ = families.from_saved(document, tensors, backbone=backbone)
    except ModelError as error:
        raise ModelError(
            f"{folder}: {CONFIG} or {WEIGHTS} is not of this model: {error}"
        ) from error
    if extractor is not None and extractor.dim != model.config.feature_dim:
        raise ModelError(
            f"{folder}: {CONFIG} describes a model of features with {model.config.feature_dim} "
            f"values, and the extractor of {OWN} gives {extractor.dim}"
        )
    try:
        tokenizer = load_tokenizer(folder)
    except ConfigError as error:
        raise ModelError(str(error)) from error
    if len(tokenizer) > model.config.vocab_size:
        raise ModelError(
            f"{folder}: its tokenizer has {len(tokenizer)} words and its model "
            f"{model.config.vocab_size}: tokenizer.json or vocab.txt is another model's"
        )
    answers = tuple(card.pop("answers"))
    if len(answers) != model.config.num_answers:
        raise ModelError(
            f"{storage.join(folder, OWN)}: answers: {len(answers)} of them, and the model gives "
            f"{model.config.num_answers}"
        )
    return ModelFolder(model.eval(), tokenizer, answers, card, decoding)


def _placed(folder: str, error: ModelError) -> str:
    """Returns a message that names the folder."""
    said = str(error)
    return said if said.startswith(folder) else f"{folder}: {said}"


def initialise(model: VisionLanguageModel, location: str, fresh: Sequence[str] = ()) -> LoadReport:
    """Takes over what fits of other weights, and tells what does not.

    From a folder: ours, BERT's, a decoder's, or another in the HF layout; or from one file of a
    family's authors. `fresh` names modules that keep their initialisation whatever is there. A
    folder's backbone is taken over by a model that has one. Raises ModelError for what would be a
    surprise; see layouts.take_over.
    """
    try:
        backbone = storage.join(location, BACKBONE_WEIGHTS)
        if model.backbone is not None and storage.exists(backbone):
            assign(model.backbone.get_submodule(NETWORK), load(backbone), backbone)
        if is_original(location):
            return families.take_over(model, read_original(location), "original", fresh)
        if is_model(location):
            require_unchanged(location, read_own(location))
        document, tensors = read_weights(location)
        families.require_same_computation(model, document)
        layout = families.layout_of(model, document)
        return families.take_over(model, tensors, layout, fresh)
    except ModelError as error:
        raise ModelError(_placed(location, error)) from error


def require_same_words(tokenizer: str, location: str) -> None:
    """Raises ConfigError if a folder to start from has a tokenizer, and this is another one.

    A number of a word would mean another word, and no shape would tell.
    """
    if is_original(location):
        return
    try:
        theirs = load_tokenizer(location).get_vocab()
    except (ConfigError, StorageError):  # it has none: only the number of words can be compared
        return
    ours = load_tokenizer(tokenizer).get_vocab()
    moved = [word for word, number in theirs.items() if ours.get(word) != number]
    if moved:
        raise ConfigError(
            f"model.initial: {location}: {len(moved):,} of its {len(theirs):,} words are not those "
            f"of this run's tokenizer, such as {moved[0]!r}; set model.tokenizer={location}"
        )


def _backbone(folder: str, extractor: ExtractorCard | None) -> nn.Module | None:
    """Returns the network that a model sees with, if it has one of its own."""
    try:
        network = backbone_config(extractor)
    except FeatureError as error:
        raise ModelError(f"{OWN}: extractor: {error}") from error
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
