"""The query engine of the manifest: DuckDB over streams of rows, in bounded memory.

What outgrows memory (a join, a sort, the newest row of every key) is done here and nowhere else:
beyond its bound DuckDB spills to a scratch folder. Rows come as Arrow streams, so that a table is
read by the library that keeps it, wherever it lies, a batch at a time.
"""

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import duckdb
import pyarrow as pa

from pipeline.errors import ManifestError
from pipeline.scratch import scratch_folder

MEMORY_BYTES = 1 << 30
BATCH_ROWS = 1 << 16  # of the batches that answers come in

# Nothing is fetched from the network, and no Python variable is taken for a table.
_SETTINGS: dict[str, Any] = {
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "python_enable_replacements": False,
    "preserve_insertion_order": False,  # an order is asked for where it matters
    # A stream does not say how long it is: what a join holds in memory is its right-hand side.
    "disabled_optimizers": "join_order,build_side_probe_side",
}


class Rows(Protocol):
    """What can be read as a stream of Arrow batches: a `pa.Table`, or `Scan` of a table on disk."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


class Scan:
    """Rows that are read anew from their source each time they are asked for.

    Unlike a reader, which is used up by one query, it may stand behind a view.
    """

    def __init__(self, read: Callable[[], Rows]) -> None:
        self._read = read

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return self._read().__arrow_c_stream__(requested_schema)


class Engine:
    """A database in memory that lives for one piece of work.

    At most `memory_bytes` are held by joins, sorts and groups; the rest of them lies in a scratch
    folder. Failures of reading, of the disk or of memory are raised as ManifestError.
    """

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self._spilled = tempfile.TemporaryDirectory(dir=_scratch(), prefix="spilled-")
        self._database = duckdb.connect(
            config=_SETTINGS
            | {
                "memory_limit": f"{memory_bytes // 1024}KiB",
                "temp_directory": self._spilled.name,
            }
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _failure: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._database.close()
        self._spilled.cleanup()

    def register(self, name: str, rows: Rows) -> None:
        """Makes rows a view of this name; they are read whenever a query names it."""
        try:
            self._database.register(name, rows)
        except duckdb.Error as error:
            raise _failed(error) from error

    def register_newest(
        self,
        name: str,
        scan: Callable[[Sequence[str]], Rows],
        identity: Sequence[str],
        columns: Sequence[str],
    ) -> None:
        """Makes the row with the highest `sequence` of every identity a view of this name.

        `scan` returns rows with the columns that it is given; no two rows have both identity and
        sequence in common. What has to be remembered are hashes and the superseded rows: a first
        reading of the identities finds the hashes that come again, a second one which rows of
        those are superseded, and the view leaves these out. Two identities with one hash are told
        apart by the second.
        """
        ids = ", ".join(map(identifier, identity))
        every, superseded = identifier(f"{name} all"), identifier(f"{name} superseded")
        code = f"hash({ids})"
        self.register(f"{name} identities", scan([*identity, "sequence"]))
        identities = identifier(f"{name} identities")
        self.run(
            f"CREATE TEMP TABLE {superseded} AS "
            f"WITH repeated AS (SELECT {code} AS code FROM {identities} "
            "GROUP BY code HAVING count(*) > 1) "
            f"SELECT {ids}, sequence FROM {identities} "
            f"WHERE {code} IN (SELECT code FROM repeated) "
            f"QUALIFY sequence < max(sequence) OVER (PARTITION BY {ids})"
        )
        is_clean = not self.value(f"SELECT count(*) FROM {superseded}")
        if is_clean:
            self.register(name, scan(columns))
            return
        self.register(f"{name} all", scan(sorted({*columns, *identity, "sequence"})))
        wanted = ", ".join(map(identifier, columns))
        self.run(
            f"CREATE TEMP VIEW {identifier(name)} AS SELECT {wanted} FROM {every} "
            f"ANTI JOIN {superseded} USING ({ids}, sequence)"
        )

    def run(self, sql: str, parameters: Sequence[object] = ()) -> None:
        """Runs a statement without an answer."""
        try:
            self._database.execute(sql, list(parameters))
        except duckdb.Error as error:
            raise _failed(error) from error

    def value(self, sql: str, parameters: Sequence[object] = ()) -> Any:
        """Returns the only value of the only row of an answer."""
        return self.table(sql, parameters)[0][0].as_py()

    def table(self, sql: str, parameters: Sequence[object] = ()) -> pa.Table:
        """Returns a query's answer whole."""
        try:
            return self._answer(sql, parameters).read_all()
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            raise _failed(error) from error

    def batches(self, sql: str, parameters: Sequence[object] = ()) -> Iterator[pa.RecordBatch]:
        """Yields a query's answer, of which no more is held than is being read.

        The engine takes the next query when this one's answer was read or closed.
        """
        try:
            yield from self._answer(sql, parameters)
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            raise _failed(error) from error

    def _answer(self, sql: str, parameters: Sequence[object]) -> pa.RecordBatchReader:
        # Not `execute`, whose answers are held whole before they become Arrow's.
        return self._database.sql(sql, params=list(parameters)).to_arrow_reader(BATCH_ROWS)


def identifier(name: str) -> str:
    """Returns the name of a table or a column as a query has it."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Returns a string as a query has it."""
    return "'" + text.replace("'", "''") + "'"


def _failed(error: Exception) -> ManifestError:
    first = str(error).strip().splitlines()[0]
    return ManifestError(f"the manifest cannot be queried ({first})")


@functools.cache
def _scratch() -> Path:
    return scratch_folder()
