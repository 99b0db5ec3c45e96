"""The listing in a scratch file, from which a few records are taken back."""

import os
import tempfile
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.data.sources.columns import LISTED
from pipeline.errors import StorageError

Int64Array = npt.NDArray[np.int64]


class ListingSpool:
    """Listed records by their number in the listing: 8 bytes a batch stay in memory."""

    def __enter__(self) -> Self:
        self._file = tempfile.TemporaryFile(prefix="sightline-")
        packed = pa.ipc.IpcWriteOptions(compression="lz4")  # a quarter as much, in no more time
        self._writer = pa.ipc.new_file(self._file, LISTED, options=packed)
        self._first = [0]  # the number of each batch's first record, then of the next one
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _failure: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    @property
    def num_listed(self) -> int:
        """How many records were added."""
        return self._first[-1]

    def add(self, batch: pa.RecordBatch) -> None:
        """Appends records of schema LISTED; raises StorageError if the scratch folder is full."""
        try:
            self._writer.write_batch(batch)
        except OSError as error:
            folder = tempfile.tempdir or os.environ.get("TMPDIR", "/tmp")
            raise StorageError(
                f"{folder}: cannot be written ({error}); TMPDIR names another folder"
            ) from error
        self._first.append(self.num_listed + batch.num_rows)

    def finish(self) -> None:
        """Ends the file: no more is added, and records can be taken."""
        self._writer.close()

    def take(self, numbers: Int64Array) -> pa.Table:
        """Returns the records of ascending numbers."""
        if not len(numbers):
            return LISTED.empty_table()
        reader = pa.ipc.open_file(self._file)
        edges = np.searchsorted(numbers, self._first)
        found = [
            reader.get_batch(i).take(pa.array(numbers[edges[i] : edges[i + 1]] - self._first[i]))
            for i in range(len(self._first) - 1)
            if edges[i + 1] > edges[i]
        ]
        return pa.Table.from_batches(found, LISTED)
