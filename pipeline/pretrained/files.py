"""A model's files: a folder in the Hugging Face layout, or its authors' one file."""

import io
import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline import storage
from pipeline.data.read.extractor_card import ExtractorCard
from pipeline.digest import digest_of, digest_of_parts
from pipeline.errors import FeatureError, ModelError, StorageError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PICKLED = "pytorch_model.bin"  # the same before there was safetensors
INDEX = ".index.json"  # after either name: which of several files holds each tensor
OWN = "sightline.json"  # ours: answers, extractor card, data version; written last

ORIGINALS = (".pth", ".th", ".pt", ".bin")  # what the authors of a family publish

DIGESTS = "digests"  # in sightline.json: of the files beside it, and of itself


def is_model(folder: str) -> bool:
    """Whether a folder holds a whole model of ours."""
    return storage.exists(storage.join(folder, OWN))


def is_original(location: str) -> bool:
    """Whether a location names one file of weights, as a family's authors publish them."""
    return location.endswith(ORIGINALS)


def read_weights(folder: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns `config.json` and the tensors beside it, or raises ModelError naming the file.

    Weights may lie in one file or, with an index beside them, in several.
    """
    try:
        document = read_json(storage.join(folder, CONFIG))
        files, promised = _weights_of(folder)
        tensors: dict[str, Tensor] = {}
        for location in files:
            tensors |= _tensors(storage.read_bytes(location), location)
    except StorageError as error:
        raise ModelError(
            f"{folder}: expected a model folder with {CONFIG} and {WEIGHTS}: {error}"
        ) from error
    absent = [name for name in promised if name not in tensors]
    if absent:
        raise ModelError(
            f"{folder}: its index names {len(absent)} tensors that no file holds, as {absent[0]}"
        )
    return document, tensors


def read_own(folder: str) -> dict[str, Any]:
    """Returns what `sightline.json` records, or raises ModelError naming the wrong field."""
    location = storage.join(folder, OWN)
    try:
        own = read_json(location)
    except StorageError as error:
        raise ModelError(f"{folder}: not a model of ours: it has no {OWN}") from error
    for key, (kind, said) in _FIELDS.items():
        if key in own and (not isinstance(own[key], kind) or isinstance(own[key], bool)):
            raise ModelError(f"{location}: {key} is {str(own[key])[:60]!r}; expected {said}")
    if "answers" not in own:
        raise ModelError(f"{location}: answers is missing; expected a list of texts")
    if not all(isinstance(answer, str) for answer in own["answers"]):
        raise ModelError(f"{location}: answers: expected texts alone")
    return own


_FIELDS: dict[str, tuple[Any, str]] = {
    "answers": (list, "a list of texts"),
    "family": (str, "a name"),
    "phase": (str, "a name"),
    "step": (int, "a number"),
    "max_tokens": (int, "a number"),
    "objectives": (dict, "objectives by name"),
    "training": (dict, "settings by name"),
    "data": (dict, "the dataset it was trained on"),
    "extractor": (dict | None, "the card of an extractor"),
}


def extractor_of(made: Mapping[str, Any]) -> ExtractorCard | None:
    """Returns the card of what a model sees by, of what `sightline.json` records.

    None if it does not say. Raises ModelError for something else.
    """
    document = made.get("extractor")
    if not document:
        return None
    try:
        return ExtractorCard.parse(document, f"{OWN}: extractor")
    except FeatureError as error:
        raise ModelError(str(error)) from error


def read_json(location: str) -> dict[str, Any]:
    """Returns a file's object, or raises ModelError naming it; StorageError if it is not there."""
    payload = storage.read_bytes(location)
    try:
        document = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{location}: damaged: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ModelError(f"{location}: expected an object, found {type(document).__name__}")
    return document


def read_original(location: str) -> dict[str, Tensor]:
    """Returns the tensors of a pickled file, of which nothing but tensors is loaded.

    Raises ModelError if there is more in it, which a pickle could run, or less.
    """
    try:
        return _unpickled(storage.read_bytes(location), location)
    except StorageError as error:
        raise ModelError(f"{location}: {error}") from error


def digest(location: str) -> str:
    """Returns a digest of a model's weights: of a folder's, or of one file."""
    try:
        parts = [location] if is_original(location) else _weights_of(location)[0]
        return digest_of_parts(map(storage.read_bytes, parts))
    except StorageError as error:
        raise ModelError(f"{location}: {error}") from error


def with_digests(own: Mapping[str, Any], payloads: Mapping[str, bytes]) -> dict[str, Any]:
    """Adds to what `sightline.json` records the digests of files beside it, and its own."""
    digests = {name: digest_of(payload) for name, payload in payloads.items()}
    whole = {**own, DIGESTS: digests}
    return {**own, DIGESTS: {**digests, OWN: _own_digest(whole)}}


def require_unchanged(folder: str, own: Mapping[str, Any]) -> None:
    """Raises ModelError naming the first file that is not as it was when the model was saved."""
    digests = own.get(DIGESTS, {})
    if not isinstance(digests, dict):
        raise ModelError(f"{storage.join(folder, OWN)}: {DIGESTS}: expected digests by file name")
    for name, expected in digests.items():
        location = storage.join(folder, name)
        if name == OWN:
            found = _own_digest(own)
        else:
            try:
                found = digest_of(storage.read_bytes(location))
            except StorageError as error:
                raise ModelError(f"{location}: it belongs to the model and is gone") from error
        if found != expected:
            raise ModelError(
                f"{location}: damaged, or changed since the model was saved; take a whole copy, or "
                f"export the model anew (where the change was meant: remove the file from "
                f"{DIGESTS} in {OWN})"
            )


def _own_digest(own: Mapping[str, Any]) -> str:
    digests = {name: one for name, one in own[DIGESTS].items() if name != OWN}
    canonical = json.dumps({**own, DIGESTS: digests}, sort_keys=True, ensure_ascii=True)
    return digest_of(canonical.encode())


def _weights_of(folder: str) -> tuple[list[str], list[str]]:
    """Returns the files that hold a folder's tensors, and which tensors an index says there are."""
    for name in (WEIGHTS, PICKLED):
        location = storage.join(folder, name)
        if storage.exists(location):
            return [location], []
        if storage.exists(location + INDEX):
            named = _weight_map(location + INDEX)
            files = sorted(set(named.values()))
            return [storage.join(folder, shard) for shard in files], list(named)
    return [storage.join(folder, WEIGHTS)], []  # which its reader finds missing


def _weight_map(location: str) -> dict[str, str]:
    """Reads an index: a tensor's name to the name of the file that holds it."""
    named = read_json(location).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ModelError(f"{location}: weight_map: expected the file of each tensor")
    for tensor, name in named.items():
        if not isinstance(name, str) or "/" in name or "\\" in name or name in ("", ".", ".."):
            raise ModelError(f"{location}: weight_map.{tensor}: {name!r} is no name of a file here")
    return named


def _tensors(payload: bytes, location: str) -> dict[str, Tensor]:
    if location.endswith(ORIGINALS):
        return _unpickled(payload, location)
    try:
        return safetensors.torch.load(payload)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ModelError(f"{location}: damaged: {error}") from error


def _unpickled(payload: bytes, location: str) -> dict[str, Tensor]:
    try:
        found = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{location}: not a file of tensors alone, or damaged; nothing was run: {reason}"
        ) from error
    for wrapper in ("state_dict", "model"):  # what training scripts put around weights
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not found:
        raise ModelError(f"{location}: expected named tensors, found {type(found).__name__}")
    others = [name for name, tensor in found.items() if not isinstance(tensor, Tensor)]
    if others:
        said = ", ".join(str(name) for name in others[:5])
        raise ModelError(f"{location}: expected tensors alone, found also {said}")
    return dict(found)
