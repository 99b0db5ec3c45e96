"""Splits: taken from the files where a setting has one for each, else from a hash of the key."""

import math
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline.data.sample import safe_key
from pipeline.data.sources.base import Locations, in_validation
from pipeline.data.sources.digests import digests

_DEFAULT_VALIDATION_FRACTION = 0.1


def validation_share(of_what: str) -> Any:
    """Returns the field `validation_fraction` of settings, for images of what is told."""
    return Field(
        default=None,
        ge=0,
        lt=1,
        description="the share of images whose key's hash puts them into `validation`, "
        f"{of_what}; null: {_DEFAULT_VALIDATION_FRACTION}",
    )


def hash_split(key: str, validation_fraction: float | None) -> str:
    """Returns `validation` for this share of all keys, a tenth if null, and `train` for others."""
    fraction = _DEFAULT_VALIDATION_FRACTION if validation_fraction is None else validation_fraction
    return "validation" if in_validation(key, fraction) else "train"


def hash_splits(keys: pa.Array, validation_fraction: float | None) -> pa.Array:
    """Returns `hash_split` of every key of a column."""
    fraction = _DEFAULT_VALIDATION_FRACTION if validation_fraction is None else validation_fraction
    hashes = digests(pc.binary_join_element_wise("split:", keys, ""))
    # A whole number is below a float if it is below the next whole number: compared exactly.
    return pc.if_else(pa.array(hashes < math.ceil(fraction * 2**64)), "validation", "train")


def folders_of(images: Locations, split: str) -> list[str]:
    """Returns the folders a split's images are in, those of all where it has none of its own."""
    folders = images[split] if isinstance(images, Mapping) else images
    return [folders] if isinstance(folders, str) else folders


def check_splits(
    name: str,
    files: object,
    validation_fraction: float | None,
    beside: Mapping[str, object],
) -> None:
    """Raises ValueError unless the settings beside `files` agree with it about the splits.

    With a file for each split, a setting beside it is one value or has the same splits, and
    nothing is left for `validation_fraction` to divide. With one file, each is one value.
    """
    if not isinstance(files, dict):
        for other, setting in beside.items():
            if isinstance(setting, dict):
                raise ValueError(
                    f"{other} has a value for each split but {name} is one file; give {name} a "
                    f"file for each split as well, or {other} one value"
                )
        return
    if validation_fraction is not None:
        raise ValueError(
            f"validation_fraction splits a single annotation file, but {name} has a "
            "file for each split; leave one of them out"
        )
    if not files:
        raise ValueError(f"{name} names no file")
    check_names(*files)
    for other, setting in beside.items():
        if isinstance(setting, dict) and set(setting) != set(files):
            raise ValueError(
                f"{other} has the splits {sorted(setting)}, {name} has {sorted(files)}; "
                "they must be the same"
            )


def check_names(*splits: str) -> None:
    """Raises ValueError unless each can name a folder of shards."""
    for split in splits:
        if safe_key(split) != split:
            raise ValueError(f"split {split!r}: only ASCII letters, digits, '_' and '-'")
