"""Other people's loaders, set up as their manuals show it."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.read.dataset import Split

Epoch = Callable[[], Iterator[npt.NDArray[Any]]]  # batches of an epoch: (B, …) each
_SHUFFLE_SAMPLES = 256  # webdataset's buffer; ours shuffles among more


def installed(package: str) -> str | None:
    """Returns a package's version, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def webdataset_features(tars: Sequence[str], batch_size: int, workers: int) -> Epoch:
    """Reads the sidecars themselves: any WebDataset reader can."""
    return _webdataset(tars, batch_size, workers, "npy", None)


def webdataset_images(tars: Sequence[str], batch_size: int, workers: int, size: int) -> Epoch:
    """Reads the shards themselves, decoded and scaled by Pillow."""
    from PIL import Image

    def scaled(image: Image.Image) -> npt.NDArray[np.uint8]:
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))

    return _webdataset(tars, batch_size, workers, "jpg", scaled)


def _webdataset(
    tars: Sequence[str],
    batch_size: int,
    workers: int,
    part: str,
    change: Callable[[Any], Any] | None,
) -> Epoch:
    import webdataset

    samples = webdataset.WebDataset(
        list(tars), shardshuffle=len(tars), detshuffle=True, empty_check=False
    )
    samples = samples.shuffle(_SHUFFLE_SAMPLES).decode(*(["pilrgb"] if part == "jpg" else []))
    if change is not None:
        samples = samples.map_dict(**{part: change})
    batches = samples.to_tuple(part).batched(batch_size)
    loader = webdataset.WebLoader(
        batches, batch_size=None, num_workers=workers, persistent_workers=workers > 0
    )

    def epoch() -> Iterator[npt.NDArray[Any]]:
        for (batch,) in loader:
            yield np.asarray(batch)

    return epoch


def litdata_features(split: Split, folder: str, batch_size: int, workers: int) -> Epoch:
    """Writes the features in its own format first."""
    litdata = importlib.import_module("litdata")  # optional, and without types

    def features(row: int) -> dict[str, npt.NDArray[Any]]:
        return {"features": split.features([row]).values[0]}

    with contextlib.redirect_stdout(sys.stderr):
        litdata.optimize(
            features,
            list(range(split.num_samples)),
            output_dir=folder,
            chunk_bytes="64MB",
            num_workers=1,
            start_method="fork",
            verbose=False,
        )
    # By default it decodes forty neighbours of each sample, which random order has no use for.
    dataset = litdata.StreamingDataset(folder, shuffle=True, drop_last=False, batch_decode=False)
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=batch_size, num_workers=workers, persistent_workers=workers > 0
    )

    def epoch() -> Iterator[npt.NDArray[Any]]:
        for batch in loader:
            yield batch["features"].numpy()

    return epoch
