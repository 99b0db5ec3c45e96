"""Weights files of frozen networks, local or downloaded."""

import hashlib
import io
import pickle
import re
import urllib.request
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import storage
from pipeline.digest import digest_of_parts
from pipeline.errors import FeatureError, StorageError

if TYPE_CHECKING:
    from torch import Tensor, nn

SUFFIXES = (".safetensors", ".pth", ".pt")
CONNECT_TIMEOUT_SECONDS = 10
RANDOM_SEED = 0
CALIBRATION_IMAGES = 4


def check_file(location: str) -> None:
    """Raises FeatureError unless there is a weights file of a kind that `load` reads."""
    if not location.endswith(SUFFIXES):
        raise FeatureError(
            f"extractor.weights: found {location!r}; expected 'default', 'random' or a file "
            f"ending in {', '.join(SUFFIXES)}"
        )
    if not storage.exists(location):
        raise FeatureError(
            f"extractor.weights: no such file: {storage.absolute(location)}; give the path of a "
            "state dict, 'default' for torchvision's own weights, or 'random'"
        )


def check_download(url: str) -> None:
    """Raises FeatureError unless the file is in torch's cache or can be had over the network."""
    if cached(url).exists():
        return
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=CONNECT_TIMEOUT_SECONDS):
            return
    except OSError as error:  # URLError and timeouts are both
        raise FeatureError(_how_to_fetch(url, error)) from error


def cached(url: str) -> Path:
    """Returns where torch's hub cache has, or would have, the file of a URL."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def download(url: str) -> Path:
    """Returns the file in torch's hub cache, fetched if it is not there yet.

    Safe to call from many processes: the file appears whole. Raises FeatureError saying which
    file to fetch and where to put it.
    """
    target = cached(url)
    if not target.exists():
        try:
            with urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT_SECONDS) as response:
                payload = response.read()
        except OSError as error:
            raise FeatureError(_how_to_fetch(url, error)) from error
        _verify(url, payload)
        storage.write_bytes(str(target), payload)
    return target


def load(location: str) -> dict[str, "Tensor"]:
    """Reads a state dict without running any code in it, or raises FeatureError."""
    import safetensors
    import safetensors.torch
    import torch

    try:
        payload = storage.read_bytes(location)
        if location.endswith(".safetensors"):
            return safetensors.torch.load(payload)
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (StorageError, safetensors.SafetensorError, pickle.UnpicklingError) as error:
        raise FeatureError(f"weights {location}: cannot be read: {error}") from error
    except (RuntimeError, EOFError) as error:  # a damaged zip archive
        raise FeatureError(f"weights {location}: damaged: {error}") from error
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise FeatureError(
            f"weights {location}: expected a state dict (names to tensors), found "
            f"{type(state).__name__}"
            + (f" with keys {', '.join(map(str, list(state)[:5]))}" if state else "")
        )
    return state


def assign(network: "nn.Module", state: Mapping[str, "Tensor"], location: str) -> None:
    """Copies the tensors that the network has; FeatureError where one is absent or misshapen.

    Tensors of layers that the network lacks, such as the classifier above a chosen node, are
    left out.
    """
    wanted = network.state_dict()
    # The count of training batches is bookkeeping; converted files often lack it.
    needed = {name for name in wanted if not name.endswith("num_batches_tracked")}
    absent = sorted(needed - set(state))
    misshapen = sorted(
        f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in needed & set(state)
        if state[name].shape != wanted[name].shape
    )
    if absent or misshapen:
        raise FeatureError(
            f"weights {location}: not a state dict of this network: "
            + "; ".join(
                f"{len(names)} {what}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
                for what, names in (("absent", absent), ("of another shape", misshapen))
                if names
            )
        )
    network.load_state_dict({name: state[name] for name in needed}, strict=False)


def digest(network: "nn.Module", without: Collection[str] = ()) -> str:
    """Returns a hash of the network's names and values, wherever they came from.

    Tensors named in `without` do not count: those that nothing is computed with.
    """
    return digest_of_parts(
        part
        for name, value in sorted(network.state_dict().items())
        if not name.endswith("num_batches_tracked") and name not in without
        for part in (
            f"{name} {value.dtype} {tuple(value.shape)}\n".encode(),
            value.detach().cpu().contiguous().numpy().tobytes(),
        )
    )


def default_url(network: str) -> str:
    """Returns where torchvision has its best weights for one of its networks."""
    import torchvision

    url: str = torchvision.models.get_model_weights(network).DEFAULT.url
    return url


def check(weights: str, network: str) -> None:
    """Raises FeatureError unless `weights`: default, random or a file, can be had."""
    if weights == "default":
        check_download(default_url(network))
    elif weights != "random":
        check_file(weights)


def fill(network: "nn.Module", name: str, weights: str) -> str:
    """Copies `default` weights or a file's into a torchvision network; returns where they are.

    That is `default`, or the absolute location of the file. Raises FeatureError if they cannot
    be had or are another network's.
    """
    if weights == "default":
        location = str(download(default_url(name)))
        assign(network, load(location), location)
        return weights
    location = storage.absolute(weights)
    assign(network, load(location), location)
    return location


def calibrate(network: "nn.Module", run: Callable[["Tensor"], object], image_size: int) -> None:
    """Sets batch-norm statistics from seeded noise pictures (4, 3, S, S), which `run` is given.

    Without this, random weights make each layer larger or smaller than the one before it, and a
    deep network ends at values that float16 cannot hold (MobileNetV2: 1e-9).
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    layers = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        layer.momentum = None  # a plain mean of what was seen
        layer.reset_running_stats()
        layer.train()
    noise = torch.Generator().manual_seed(RANDOM_SEED)
    with torch.inference_mode():
        run(torch.randn(CALIBRATION_IMAGES, 3, image_size, image_size, generator=noise))
    network.eval()


def _verify(url: str, payload: bytes) -> None:
    """Compares with the beginning of the SHA-256 that torch puts into its file names."""
    stated = re.search(r"-([0-9a-f]{8,})\.", url.rsplit("/", 1)[-1])
    found = hashlib.sha256(payload).hexdigest()
    if stated and not found.startswith(stated[1]):
        raise FeatureError(f"{url}: damaged download: SHA-256 {found} for {stated[1]}…; try again")


def _how_to_fetch(url: str, error: OSError) -> str:
    return (
        f"extractor.weights: 'default' needs {url}, which cannot be reached ({error}). Fetch it on "
        f"a machine that can, and put it at {cached(url)}, or set weights to its path"
    )
