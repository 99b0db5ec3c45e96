"""The fingerprints of image files by their locations: one listing of each folder, 16 bytes a file.

A hundred million locations may share hashes of 64 bits safely.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline import storage
from pipeline.data.sources.digests import Digests, digests
from pipeline.errors import SourceError, StorageError

BoolArray = npt.NDArray[np.bool_]


class _Files(NamedTuple):
    """The files of one folder, in the order of the hashes of their locations."""

    hashes: Digests
    fingerprints: Digests  # of location and stamp, as `image_files.listed` makes them


class FileFingerprints:
    """The files of some folder and the folders below it, each listed when it is first asked for."""

    def __init__(self, root: str) -> None:
        """Raises SourceError if the folder is absent."""
        try:
            self._folders = {root: _list(root)}
        except StorageError as error:
            raise SourceError(f"images: {error}") from error

    def find(self, locations: pa.Array) -> tuple[Digests, BoolArray]:
        """Returns the fingerprint of each file, and whether there is such a file."""
        hashes = digests(locations)
        found, is_there = np.zeros(len(hashes), np.uint64), np.zeros(len(hashes), bool)
        parents = pc.replace_substring_regex(locations, "/[^/]*$", "").dictionary_encode()
        codes = parents.indices.to_numpy()
        order = np.lexsort((hashes, codes))
        edges = np.searchsorted(codes[order], np.arange(len(parents.dictionary) + 1))
        for code, folder in enumerate(parents.dictionary.to_pylist()):
            rows = order[edges[code] : edges[code + 1]]
            files = self._files(folder or "/")
            if len(files.hashes):
                place = np.searchsorted(files.hashes, hashes[rows])
                place = np.minimum(place, len(files.hashes) - 1)
                found[rows] = files.fingerprints[place]
                is_there[rows] = files.hashes[place] == hashes[rows]
        return found, is_there

    def _files(self, folder: str) -> _Files:
        if folder not in self._folders:
            try:
                self._folders[folder] = _list(folder)
            except StorageError:
                if storage.exists(folder):
                    raise
                self._folders[folder] = _Files(np.empty(0, np.uint64), np.empty(0, np.uint64))
        return self._folders[folder]


def _list(folder: str) -> _Files:
    digest = xxhash.xxh3_64_intdigest

    def values() -> Iterator[int]:
        for entry in storage.scan_entries(folder):
            if entry.kind == "file":
                location = storage.join(folder, entry.name).encode(errors="surrogateescape")
                yield digest(location)
                yield digest(b"%b %b" % (location, entry.stamp.encode()))

    pairs = np.fromiter(values(), np.uint64).reshape(-1, 2)
    order = np.argsort(pairs[:, 0])
    return _Files(pairs[order, 0], pairs[order, 1])
