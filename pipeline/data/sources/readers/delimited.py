"""Delimited text: the rows of CSV, TSV and their kin, and the lines that cannot be read as rows.

What quotation marks mean is where such files go wrong. Programs that write CSV quote a cell that
holds a delimiter, a line break or a mark, and double the marks in it; many TSV files, and some CSV
files, were written without regard to marks, so that one that opens a caption would swallow all
rows up to the next. `quoting` says which it is:

- `csv`: marks quote. A line that no CSV writer makes is a faulty row; reading goes on at the next.
- `none`: marks are ordinary characters, and every line is a row.
- `auto`: `csv` if all of the file can be read so and no quoted cell holds what look like further
  rows; else `none` if every line has the header's number of cells then, and no cell is quoted with
  its marks behind backslashes; else the file is refused.
"""

import csv
import io
import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Literal, cast

from pipeline import storage
from pipeline.data.sources.image_files import image_name
from pipeline.data.sources.readers.gzip_file import is_gzip, unpacking
from pipeline.errors import SourceError

Quoting = Literal["auto", "csv", "none"]

_MAX_LINE = 1 << 26  # characters
_MAX_CELL = 1 << 24  # characters; Python's own limit of 128 Ki is less than some dialogs
_MAX_QUOTED_LINES = 1000  # that one cell may go over
_QUOTE = '"'
_SEPARATORS = (",", "\t", ";", "|")
_MARKS = {  # what a text file may begin with, the longest first
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_START_BYTES = 4096
_UNDECODED = re.compile("[\udc80-\udcff]")
_FAULTS = {  # by what Python's reader says
    "unexpected end": "a quotation mark opens a cell that none closes",
    "expected after": "words follow the quotation mark that closes a cell",
    "new-line": "a carriage return stands within the line",
    "field larger": f"a cell has over {_MAX_CELL} characters",
}


@dataclass(frozen=True)
class TextForm:
    """How a text file is written, as far as a recipe says so."""

    delimiter: str | None = None  # None: a tab in `.tsv`, else a comma
    quoting: Quoting = "auto"
    encoding: str | None = None  # None: UTF-8, or what its byte order mark says


ANY_FORM = TextForm()


@dataclass(frozen=True)
class Line:
    """A row of cells, or what is wrong with the line. `number` counts the file's lines from 1."""

    number: int
    cells: Sequence[str]
    fault: str = ""


@contextmanager
def text_lines(location: str, encoding: str | None) -> Iterator[Iterator[str]]:
    """Yields a text file's lines, packed with gzip or not, with their ends.

    Bytes that are not of the encoding become lone surrogates, which `undecoded` finds. Raises
    SourceError if the file is no such text, also while it is read.
    """
    with storage.reader(location) as stored:
        file: BinaryIO = stored
        if not hasattr(stored, "peek"):
            file = cast(BinaryIO, io.BufferedReader(stored))
        if is_gzip(_start(file)):
            file = unpacking(file, location)
        start = _start(file)
        marked = (name for mark, name in _MARKS.items() if start.startswith(mark))
        told = next(marked, encoding or "")
        if not told and start.count(0) > len(start) // 4:
            raise SourceError(
                f"{location}: not UTF-8 but NUL characters; if it is UTF-16, set `encoding: "
                "utf-16-le`, and if it is no text, give it the ending of what it is"
            )
        try:
            decoder = io.TextIOWrapper(file, told or "utf-8", "surrogateescape", _line_end(start))
            yield _limited(decoder, location)
        except UnicodeError as error:
            raise SourceError(
                f"{location}: not {told or 'UTF-8'}: {error}; `encoding` names another"
            ) from error


def _start(file: BinaryIO) -> bytes:
    """Returns what a buffered file begins with, without reading on in it."""
    found: bytes = cast(io.BufferedReader, file).peek(_START_BYTES)[:_START_BYTES]
    return found


def _line_end(start: bytes) -> str:
    """Returns what ends a file's lines: a carriage return only if the first one ends so."""
    first = re.search(rb"\r\0*\n|\n|\r", start)
    return "\r" if first and first[0] == b"\r" else "\n"


def _limited(file: io.TextIOWrapper, location: str) -> Iterator[str]:
    number = 0
    while line := file.readline(_MAX_LINE):
        number += 1
        if len(line) == _MAX_LINE:
            raise SourceError(
                f"{location}: line {number}: over {_MAX_LINE} characters; expected a row"
            )
        yield line


def undecoded(text: str) -> str:
    """Returns what is wrong with a text of `text_lines`, or nothing."""
    found = _UNDECODED.search(text)
    if found is None:
        return ""
    return (
        f"byte 0x{ord(found[0]) - 0xDC00:02x} is not UTF-8; if the file is in another encoding, "
        "`encoding` names it, such as cp1252"
    )


class Delimited:
    """A delimited text file with a header. `columns` are those that a recipe names.

    Raises SourceError if one of them is not in the header, or there twice, and as `quoting` and
    `text_lines` do.
    """

    def __init__(self, location: str, form: TextForm, columns: Sequence[str], image: str) -> None:
        self._location = location
        self._encoding = form.encoding
        name = location.lower().removesuffix(".gz")
        self._delimiter = form.delimiter or ("\t" if name.endswith(".tsv") else ",")
        self._quoted = form.quoting != "none"
        self.header = self._header(columns)
        self._place = next(
            place for place, name in enumerate(self.header) if name in (image, _top(image))
        )
        if form.quoting == "auto":
            self._quoted = self._is_quoted()

    def rows(self) -> Iterator[Line]:
        """Yields the rows and faulty lines after the header; empty lines are passed over."""
        with text_lines(self._location, self._encoding) as lines:
            found = self._split(lines)
            next(found, None)
            for line, _ in found:
                if line.fault or any(line.cells):
                    yield self._checked(line)

    def _checked(self, line: Line) -> Line:
        fault = line.fault
        if not fault and len(line.cells) != len(self.header):
            fault = f"expected {len(self.header)} cells, found {len(line.cells)}"
        if not fault:
            text = self._delimiter.join(line.cells)
            fault = undecoded(text) or ("it holds a NUL character" if "\0" in text else "")
        return Line(line.number, line.cells, fault) if fault else line

    def _header(self, columns: Sequence[str]) -> list[str]:
        with text_lines(self._location, self._encoding) as lines:
            first, _ = next(self._split(lines), (Line(1, []), []))
        if first.fault or undecoded("".join(first.cells)):
            fault = first.fault or undecoded("".join(first.cells))
            raise SourceError(f"{self._location}: line 1: {fault}")
        header = [name.strip() for name in first.cells]
        for column in columns:
            name = column if column in header else _top(column)
            if name not in header:
                raise SourceError(
                    f"{self._location}: no column {column!r}; there are "
                    f"{', '.join(map(repr, header)) or 'none'}{self._hint(header, name)}"
                )
            if header.count(name) > 1:
                raise SourceError(
                    f"{self._location}: line 1: {header.count(name)} columns are called {name!r}; "
                    "give each a name of its own"
                )
        return header

    def _hint(self, header: list[str], column: str) -> str:
        for separator in _SEPARATORS:
            if column in (part.strip() for part in separator.join(header).split(separator)):
                return f"; it seems that `delimiter: {separator!r}` separates them"
        return ""

    def _is_quoted(self) -> bool:
        """Says what quotation marks mean, or raises SourceError if that cannot be told."""
        start = re.compile(f"(^|{re.escape(self._delimiter)}) *{_QUOTE}")
        cut = re.escape(self._delimiter)
        whole = re.compile(rf'(?:^|{cut}) *"((?:[^"\\]|\\.)*)" *(?={cut}|[\r\n]|$)')
        opens, uneven, escapes = False, "", 0
        with text_lines(self._location, self._encoding) as lines:
            for number, line in enumerate(lines, 1):
                opens = opens or (_QUOTE in line and start.search(line) is not None)
                if not escapes and '\\"' in line:
                    quoted = (cell[1] for cell in whole.finditer(line))
                    escapes = number if any('\\"' in text for text in quoted) else 0
                num_cells = line.count(self._delimiter) + 1
                if not uneven and num_cells != len(self.header) and line.strip():
                    uneven = f"line {number} has {num_cells} cells and not {len(self.header)}"
        if not opens:
            return True  # nothing is quoted, so that both readings are one
        fault = self._misquoted()
        if not fault:
            return True
        if escapes:
            raise SourceError(
                f"{self._location}: line {escapes}: a quoted cell has marks behind backslashes, "
                "as Spark and MySQL write them; write it with doubled marks (in Spark, "
                "`option('escape', '\"')`), or set `quoting: none`, by which marks and backslashes "
                "are of the text"
            )
        if not uneven:
            return False
        raise SourceError(
            f"{self._location}: {fault}; but if marks were ordinary characters, {uneven}. Set "
            "`quoting: none` if they are, or `quoting: csv` if they quote: lines that cannot be "
            "read so are rejected then"
        )

    def _misquoted(self) -> str:
        """Returns the first sign that marks do not quote cells in this file, or nothing."""
        with text_lines(self._location, self._encoding) as lines:
            for line, text in self._split(lines):
                if line.fault:
                    return f"line {line.number}: {line.fault}"
                if len(text) > 1 and self._swallows(text):
                    return (
                        f"line {line.number}: a quotation mark opens a cell that goes on over "
                        f"what look like further rows, up to line {line.number + len(text) - 1}"
                    )
        return ""

    def _swallows(self, text: Sequence[str]) -> bool:
        """Whether the lines of one quoted row look like several rows."""
        images = [self._image(line) for line in text]
        files = [image_name(image) != image for image in images]
        if files[0]:
            return any(files[1:])
        return all(image and not any(map(str.isspace, image)) for image in images)

    def _image(self, line: str) -> str:
        """Returns a line's cell of the image, were it a row, or nothing."""
        cells = self._unquoted(line)
        return cells[self._place].strip(_QUOTE) if len(cells) == len(self.header) else ""

    def _unquoted(self, line: str) -> list[str]:
        return [cell.strip(" ") for cell in line.rstrip("\r\n").split(self._delimiter)]

    def _split(self, lines: Iterator[str]) -> Iterator[tuple[Line, Sequence[str]]]:
        """Yields the rows of all lines, each with the lines it takes."""
        if self._quoted:
            yield from self._split_quoted(lines)
        else:
            for number, line in enumerate(lines, 1):
                yield Line(number, self._unquoted(line)), [line]

    def _split_quoted(self, lines: Iterator[str]) -> Iterator[tuple[Line, Sequence[str]]]:
        csv.field_size_limit(_MAX_CELL)
        waiting: deque[str] = deque()
        taken: list[str] = []

        def feed() -> Iterator[str]:
            while waiting or (line := next(lines, "")):
                taken.append(waiting.popleft() if waiting else line)
                if len(taken) > _MAX_QUOTED_LINES:
                    raise csv.Error("unexpected end")
                yield taken[-1]

        def reader() -> Iterator[list[str]]:
            return csv.reader(feed(), delimiter=self._delimiter, skipinitialspace=True, strict=True)

        table, number, num_cells = reader(), 1, 0
        while True:
            taken.clear()
            cells, fault = None, ""
            try:
                cells = next(table, None)
            except csv.Error as error:
                fault = next((why for sign, why in _FAULTS.items() if sign in str(error)), "")
                fault = fault or str(error)
            if cells is None and not fault:
                return
            num_cells = num_cells or len(cells or ())
            if cells is not None and len(taken) > 1 and len(cells) != num_cells:
                fault = f"expected {num_cells} cells, found {len(cells)} up to line "
                fault += str(number + len(taken) - 1)
            if fault:
                # Of what is taken only the first line is known to be bad.
                waiting.extendleft(reversed(taken[1:]))
                table = reader()
                yield Line(number, [], fault), taken[:1]
                number += 1
            else:
                yield Line(number, cells or []), list(taken)
                number += len(taken)


def _top(column: str) -> str:
    """Returns the name that a dotted path begins with."""
    return column.partition(".")[0]
