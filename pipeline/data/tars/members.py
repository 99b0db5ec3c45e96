"""Positioned reads of one part of any sample from its place in a shard."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.data.tars.foreign_tar import Location
from pipeline.data.tars.shard_files import ShardFiles
from pipeline.errors import ShardError

_LOCATIONS_HELD = 256

Int64Array = npt.NDArray[np.int64]
Wanted = TypeVar("Wanted")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Places:
    """Where one part of each of B samples lies."""

    files: Int64Array  # (B,) numbers of files, as `Members` has them
    offsets: Int64Array  # (B,) first bytes
    sizes: Int64Array  # (B,) in bytes
    keys: npt.NDArray[np.object_]  # (B,) str, for messages

    def __getitem__(self, i: int) -> "Places":
        """Returns the place of one sample, as a batch of one."""
        one = slice(i, i + 1)
        return Places(self.files[one], self.offsets[one], self.sizes[one], self.keys[one])


class Members:
    """Reads parts of samples from the files they lie in; any number of threads may at once."""

    def __init__(self, files: ShardFiles, location: Callable[[int], Location]) -> None:
        self._files = files
        self._location = lru_cache(maxsize=_LOCATIONS_HELD)(location)  # of a file's number

    def where(self, places: Places, i: int) -> str:
        """Returns the file and the sample of a place, as messages have them."""
        return f"{self._location(int(places.files[i]))}: sample {places.keys[i]!r}"

    def location(self, places: Places, i: int) -> str:
        """Returns the file of a place."""
        return str(self._location(int(places.files[i])))

    def fetch(self, places: Places) -> None:
        """Brings the files of these places, where they are far away, into the cache."""
        for number in np.unique(places.files).tolist():
            self._files.fetch(self._location(number))

    def read(self, places: Places) -> list[bytes]:
        """Returns the payloads, or raises ShardError naming the file and the sample."""
        sizes = places.sizes.tolist()
        payloads = self._read(os.pread, places, sizes)
        self._check_whole(places, sizes, [*map(len, payloads)])
        return payloads

    def read_into(self, places: Places, buffers: Sequence[list[memoryview]]) -> None:
        """Fills for each place its buffers, one after the other; they have the payload's size.

        Raises ShardError naming the file and the sample if it is not all there.
        """
        self._check_whole(places, places.sizes.tolist(), self._read(os.preadv, places, buffers))

    def _read(
        self, read: Callable[[int, Wanted, int], Found], places: Places, wanted: Sequence[Wanted]
    ) -> list[Found]:
        """Returns what a call gives for each descriptor, what is wanted of it, and offset."""
        numbers = places.files.tolist()
        files = {  # held until all is read, for a file that nobody holds may be closed
            number: self._files.open(self._location(number)) for number in set(numbers)
        }
        descriptors = [files[number].descriptor for number in numbers]
        found: list[Found] = []
        try:
            found += map(read, descriptors, wanted, places.offsets.tolist())
        except OSError as error:
            where = self.where(places, len(found))
            raise ShardError(f"{where}: cannot be read ({error})") from error
        return found

    def _check_whole(self, places: Places, sizes: list[int], found: list[int]) -> None:
        if found != sizes:
            i = next(i for i, size in enumerate(sizes) if found[i] != size)
            raise ShardError(
                f"{self.where(places, i)}: expected {sizes[i]} bytes at offset "
                f"{places.offsets[i]}, found {found[i]}; the file was cut short"
            )


def sorted_codes(names: pa.ChunkedArray) -> tuple[list[str], Int64Array]:
    """Returns the different names, sorted, and for each row the number of its name."""
    encoded = names.combine_chunks().dictionary_encode()
    indices = encoded.indices.to_numpy()
    used = np.flatnonzero(np.bincount(indices, minlength=len(encoded.dictionary)))
    distinct = encoded.dictionary.take(used).to_numpy(zero_copy_only=False)
    number = np.zeros(len(encoded.dictionary), np.int64)
    distinct, number[used] = np.unique(distinct, return_inverse=True)
    return distinct.tolist(), number[indices]
