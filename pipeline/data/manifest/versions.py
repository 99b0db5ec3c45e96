"""The versions of a manifest: its commits, and those of them that can still be opened."""

import json
from dataclasses import dataclass
from datetime import datetime

from pipeline import storage
from pipeline.errors import ManifestError, StorageError


@dataclass(frozen=True)
class Version:
    """One commit of a manifest."""

    version: int
    time: datetime
    operation: str
    replaced: bool = False  # whether it replaced the rows before it rather than add some


@dataclass(frozen=True)
class Kept:
    """The versions that `compact` has promised to keep; the others may be gone."""

    first: int  # this one and all after it
    named: frozenset[int] = frozenset()  # older ones

    def __contains__(self, version: object) -> bool:
        return version in self.named or (isinstance(version, int) and version >= self.first)

    def __str__(self) -> str:
        return ", ".join([*map(str, sorted(self.named)), f"all from {self.first} on"])


def _kept_location(url: str) -> str:
    return storage.join(url, "manifest", "kept.json")


def read_kept(url: str) -> Kept:
    """Returns the versions of a dataset that can be opened; all, as long as none was dropped."""
    location = _kept_location(url)
    if not storage.exists(location):
        return Kept(0)
    try:
        document = json.loads(storage.read_bytes(location))
        return Kept(int(document["first"]), frozenset(map(int, document["named"])))
    except (ValueError, KeyError, TypeError, StorageError) as error:
        raise ManifestError(
            f"{location}: does not say which versions are kept ({error})"
        ) from error


def write_kept(url: str, kept: Kept) -> None:
    """Says which versions are kept from now on."""
    document = {"first": kept.first, "named": sorted(kept.named)}
    storage.write_bytes(_kept_location(url), json.dumps(document).encode())
