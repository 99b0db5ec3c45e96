"""A model's files to its tensors: a folder in the Hugging Face layout, or its authors' one file."""

import io
import json
import pickle
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor

from pipeline import storage
from pipeline.errors import ModelError, StorageError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PICKLED = "pytorch_model.bin"  # the same before there was safetensors
OWN = "sightline.json"  # ours: answers, extractor card, data version; written last

ORIGINALS = (".pth", ".th", ".pt", ".bin")  # what the authors of a family publish


def is_model(folder: str) -> bool:
    """Whether a folder holds a whole model of ours."""
    return storage.exists(storage.join(folder, OWN))


def is_original(location: str) -> bool:
    """Whether a location names one file of weights, as a family's authors publish them."""
    return location.endswith(ORIGINALS)


def read_weights(folder: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns `config.json` and the tensors beside it, or raises ModelError."""
    try:
        document: dict[str, Any] = json.loads(storage.read_bytes(storage.join(folder, CONFIG)))
        weights = _weights_of(folder)
        payload = storage.read_bytes(weights)
    except StorageError as error:
        raise ModelError(
            f"{folder}: expected a model folder with {CONFIG} and {WEIGHTS}: {error}"
        ) from error
    except ValueError as error:
        raise ModelError(f"{folder}: damaged: {error}") from error
    if weights.endswith(PICKLED):
        return document, _unpickled(payload, weights)
    try:
        return document, safetensors.torch.load(payload)
    except SafetensorError as error:
        raise ModelError(f"{folder}: damaged: {error}") from error


def read_own(folder: str) -> dict[str, Any]:
    """Returns what `sightline.json` records, or raises ModelError."""
    try:
        own: dict[str, Any] = json.loads(storage.read_bytes(storage.join(folder, OWN)))
    except StorageError as error:
        raise ModelError(f"{folder}: not a model of ours: it has no {OWN}") from error
    except ValueError as error:
        raise ModelError(f"{folder}: damaged: {error}") from error
    return own


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
    weights = location if is_original(location) else _weights_of(location)
    return xxhash.xxh3_128_hexdigest(storage.read_bytes(weights))


def _weights_of(folder: str) -> str:
    weights, pickled = storage.join(folder, WEIGHTS), storage.join(folder, PICKLED)
    return pickled if storage.exists(pickled) and not storage.exists(weights) else weights


def _unpickled(payload: bytes, location: str) -> dict[str, Tensor]:
    try:
        found = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
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
        raise ModelError(f"{location}: expected tensors alone, found also {', '.join(others[:5])}")
    return dict(found)
