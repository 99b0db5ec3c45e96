"""Positioned reads of one part of any sample from its place in a shard."""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import storage
from pipeline.data.tars.foreign_tar import Location
from pipeline.data.tars.shard_files import ShardFiles
from pipeline.errors import ShardError

Int64Array = npt.NDArray[np.int64]
Wanted = TypeVar("Wanted")
Found = TypeVar("Found")


class Members:
    """Where one part of every row lies: which file, at which byte, how many bytes."""

    def __init__(
        self,
        files: ShardFiles,
        locations: Sequence[Location],
        location_of_row: Int64Array,
        offsets: Int64Array,
        sizes: Int64Array,
        keys: npt.NDArray[Any],
    ) -> None:
        self.sizes = sizes
        self.keys = keys
        self._files = files
        self._locations = locations
        self._location_of_row = location_of_row
        self._offsets = offsets

    def location(self, row: int) -> str:
        """Returns the file that holds the part of this row."""
        return str(self._locations[int(self._location_of_row[row])])

    def fetch(self, rows: Int64Array) -> None:
        """Brings the files of these rows, where they are far away, into the cache."""
        for place in np.unique(self._location_of_row[rows]).tolist():
            self._files.fetch(self._locations[place])

    @property
    def are_local(self) -> bool:
        """Whether all files are on this machine."""
        return all(storage.is_local(str(location)) for location in self._locations)

    def offset(self, row: int) -> int:
        """Returns the first byte of the part of this row in its file."""
        return int(self._offsets[row])

    def read(self, rows: Int64Array) -> list[bytes]:
        """Returns the payloads, or raises ShardError naming the file and the sample."""
        sizes = self.sizes[rows].tolist()
        payloads = self._read(os.pread, rows, sizes)
        self._check_whole(rows, sizes, [*map(len, payloads)])
        return payloads

    def read_into(self, rows: Int64Array, buffers: Sequence[list[memoryview]]) -> None:
        """Fills for each row its buffers, one after the other; they have the payload's size.

        Raises ShardError naming the file and the sample if it is not all there.
        """
        self._check_whole(rows, self.sizes[rows].tolist(), self._read(os.preadv, rows, buffers))

    def _read(
        self, read: Callable[[int, Wanted, int], Found], rows: Int64Array, wanted: Sequence[Wanted]
    ) -> list[Found]:
        """Returns what a call gives for each row's descriptor, what is wanted of it, and offset."""
        places = self._location_of_row[rows].tolist()
        files = {  # held until all is read, for a file that nobody holds may be closed
            place: self._files.open(self._locations[place]) for place in set(places)
        }
        descriptors = [files[place].descriptor for place in places]
        found: list[Found] = []
        try:
            found += map(read, descriptors, wanted, self._offsets[rows].tolist())
        except OSError as error:
            raise self._unreadable(int(rows[len(found)]), error) from error
        return found

    def _check_whole(self, rows: Int64Array, sizes: list[int], found: list[int]) -> None:
        if found != sizes:
            i = next(i for i, size in enumerate(sizes) if found[i] != size)
            raise self._cut_short(int(rows[i]), found[i])

    def _unreadable(self, row: int, error: OSError) -> ShardError:
        return ShardError(
            f"{self.location(row)}: sample {self.keys[row]!r}: cannot be read ({error})"
        )

    def _cut_short(self, row: int, found: int) -> ShardError:
        return ShardError(
            f"{self.location(row)}: sample {self.keys[row]!r}: expected {self.sizes[row]} bytes "
            f"at offset {self.offset(row)}, found {found}; the file was cut short"
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
