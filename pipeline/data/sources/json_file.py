"""Annotation files in JSON, as other people wrote them: read lazily, every field checked.

The large lists of such a file are kept as text, and an object of a list is parsed when it is
asked for: VQA's training annotations take 0.4 GB so, and 3 GB as Python objects. Memory is the
unpacked file and 8 bytes for each object of a list, 24 more where a list is grouped.
"""

import gzip
import json
import re
import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import xxhash

from pipeline import storage
from pipeline.errors import SourceError

Identity = int | str

_GZIP = b"\x1f\x8b"
_SPACE = re.compile(r"[ \t\r\n]*")
_COMMA = re.compile(r"[ \t\r\n]*,[ \t\r\n]*")
_DECODER = json.JSONDecoder()


class Fields(NamedTuple):
    """A JSON object whose fields are checked as they are read; each method raises SourceError.

    `where` names the object and `kind` the file it should come from: both are for messages. A
    tuple, because millions are made.
    """

    values: dict[str, Any]
    where: str
    kind: str

    @classmethod
    def of(cls, value: Any, where: str, kind: str) -> "Fields":
        """Returns a view of an object, or raises SourceError if the value is something else."""
        if not isinstance(value, dict):
            raise SourceError(f"{where}: expected an object, found {_shown(value)}")
        return cls(value, where, kind)

    def __contains__(self, name: object) -> bool:
        return name in self.values

    def get(self, name: str) -> Any:
        """Returns a field of any type, which must be there."""
        if name not in self.values:
            self.require(name)
        return self.values[name]

    def require(self, *names: str) -> None:
        """Raises SourceError naming every one of these fields that is not there."""
        absent = [name for name in names if name not in self.values]
        if absent:
            fields = "a field" if len(absent) == 1 else "the fields"
            found = ", ".join(map(repr, self.values)) or "none"
            raise SourceError(
                f"{self.where}: expected {fields} {', '.join(map(repr, absent))}, found {found}. "
                f"Is it {self.kind}?"
            )

    def identity(self, name: str) -> Identity:
        """Returns a number or a string."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise self._wrong(name, "a number or a string", value)
        return value

    def string(self, name: str) -> str:
        """Returns a string that can be encoded as UTF-8."""
        value = self.get(name)
        if not isinstance(value, str):
            raise self._wrong(name, "a string", value)
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise SourceError(
                f"{self.where}: {name!r}: {value!r} holds half a surrogate pair"
            ) from error
        return value

    def integer(self, name: str, stop: int) -> int:
        """Returns a whole number from 0 to below `stop`."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < stop:
            raise self._wrong(name, f"a whole number from 0 to {stop - 1}", value)
        return value

    def list(self, name: str) -> list[Any]:
        """Returns a list."""
        value = self.get(name)
        if not isinstance(value, list):
            raise self._wrong(name, "a list", value)
        return value

    def objects(self, name: str) -> Iterator["Fields"]:
        """Yields views of the objects in a list."""
        for index, value in enumerate(self.list(name)):
            yield Fields.of(value, f"{self.where}.{name}[{index}]", self.kind)

    def wrong(self, name: str, fault: str) -> SourceError:
        """Returns the error that a field has a fault."""
        return SourceError(f"{self.where}: {name!r}: {fault}")

    def _wrong(self, name: str, expected: str, found: Any) -> SourceError:
        return self.wrong(name, f"expected {expected}, found {_shown(found)}")


@dataclass(frozen=True)
class JsonList:
    """A list of a JSON file, whose elements are parsed when they are asked for."""

    where: str  # such as `captions.json: annotations`
    kind: str
    _text: str = field(repr=False)
    _starts: Sequence[int] = field(repr=False)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Any:
        return _DECODER.raw_decode(self._text, self._starts[index])[0]

    def object(self, index: int) -> Fields:
        """Returns a view of an element, or raises SourceError if it is no object."""
        return Fields.of(self[index], f"{self.where}[{index}]", self.kind)

    def objects(self) -> Iterator[Fields]:
        """Yields views of the elements in their order."""
        return map(self.object, range(len(self)))

    def strings(self) -> list[str]:
        """Returns all elements, or raises SourceError if one is no string."""
        values = [self[index] for index in range(len(self))]
        for index, value in enumerate(values):
            if not isinstance(value, str):
                raise SourceError(
                    f"{self.where}[{index}]: expected a string, found {_shown(value)}"
                )
        return values


class Groups:
    """The objects of a list by a field that identifies what they belong to."""

    def __init__(self, items: JsonList, name: str) -> None:
        self._items = items
        self._name = name
        hashes = (_hash(entry.identity(name)) for entry in items.objects())
        hashed = np.fromiter(hashes, np.uint64, len(items))
        self._order = np.argsort(hashed, kind="stable")
        self._hashes = hashed[self._order]
        self._sorted = self._hashes.data  # whose numbers are Python's: bisect is fast on it

    def of(self, identity: Identity) -> list[Fields]:
        """Returns the objects that name this identity, in the list's order."""
        hashed = _hash(identity)
        start = bisect_left(self._sorted, hashed)
        stop = bisect_right(self._sorted, hashed, start)
        found = (self._items.object(index) for index in self._order[start:stop].tolist())
        return [entry for entry in found if entry.identity(self._name) == identity]

    def __iter__(self) -> Iterator[tuple[Identity, list[Fields]]]:
        """Yields each identity with its objects, in the order of their first appearance."""
        return self.beside(())

    def beside(self, known: Collection[Identity]) -> Iterator[tuple[Identity, list[Fields]]]:
        """Yields what iteration does, without the known identities, whose objects stay unparsed."""
        starts = np.flatnonzero(np.diff(self._hashes, prepend=self._hashes[:1] + np.uint64(1)))
        stops = np.append(starts[1:], len(self._hashes))
        hashes = np.fromiter(map(_hash, known), np.uint64, len(known))
        unknown = np.flatnonzero(~np.isin(self._hashes[starts], hashes))
        for group in unknown[np.argsort(self._order[starts[unknown]])]:
            found: defaultdict[Identity, list[Fields]] = defaultdict(list)
            for index in self._order[starts[group] : stops[group]]:
                entry = self._items.object(int(index))
                found[entry.identity(self._name)].append(entry)
            yield from found.items()


@dataclass(frozen=True)
class JsonFile:
    """An annotation file: the values it holds by name, lists unparsed, objects taken apart."""

    location: str
    kind: str
    values: Mapping[str, Any]

    def list(self, *path: str) -> JsonList:
        """Returns the list at a path of names, or raises SourceError saying what is there."""
        values: Any = self.values
        for depth, name in enumerate(path):
            if not isinstance(values, dict):
                break
            if name not in values:
                found = ", ".join(map(repr, values)) or "none"
                expected = "list" if depth == len(path) - 1 else "object"
                raise SourceError(
                    f"{self.location}: expected a {expected} {'.'.join(path[: depth + 1])!r}; the "
                    f"file has the keys {found}. Is it {self.kind}?"
                )
            values = values[name]
        if not isinstance(values, JsonList):
            raise SourceError(
                f"{self.location}: expected a list {'.'.join(path)!r}, found {_shown(values)}. "
                f"Is it {self.kind}?"
            )
        return values


def read_json(location: str, kind: str) -> JsonFile:
    """Reads a JSON file, packed with gzip or not, which should hold an object.

    Raises SourceError if it is not valid JSON; `kind`, such as "a VQA questions file", is for
    messages. StorageError if it cannot be read.
    """
    values = _read(location, kind)
    if not isinstance(values, dict):
        found = "list" if isinstance(values, JsonList) else type(values).__name__
        raise SourceError(f"{location}: expected an object, found a {found}. Is it {kind}?")
    return JsonFile(location, kind, values)


def read_json_list(location: str, kind: str) -> JsonList:
    """Reads a JSON file as `read_json` does, which should hold a list."""
    values = _read(location, kind)
    if not isinstance(values, JsonList):
        raise SourceError(
            f"{location}: expected a list, found {type(values).__name__}. Is it {kind}?"
        )
    return values


def read_text(location: str) -> str:
    """Returns a file of UTF-8, packed with gzip or not; raises SourceError if it is not that."""
    payload = storage.read_bytes(location)
    try:
        if payload.startswith(_GZIP):
            payload = gzip.decompress(payload)
        return payload.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{location}: cannot be unpacked as gzip: {error}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{location}: not UTF-8: {error}") from error


def _read(location: str, kind: str) -> Any:
    text = read_text(location)
    scan = _Scan(text, location, kind)
    try:
        value, end = scan.value(scan.skip(0), "")
        end = scan.skip(end)
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{location}: not valid JSON: {error}") from error
    return value


@dataclass(frozen=True)
class _Scan:
    """Walks objects down to their lists, and lists from element to element."""

    text: str
    location: str
    kind: str

    def skip(self, position: int) -> int:
        space = _SPACE.match(self.text, position)
        assert space is not None  # it matches nothing as well
        return space.end()

    def value(self, position: int, path: str) -> tuple[Any, int]:
        """Returns the value that begins at a position, and where it ends."""
        opening = self.text[position : position + 1]
        if opening == "{":
            return self._object(position, path)
        if opening == "[":
            return self._list(position, path)
        return _DECODER.raw_decode(self.text, position)

    def _object(self, position: int, path: str) -> tuple[dict[str, Any], int]:
        values: dict[str, Any] = {}
        position = self.skip(position + 1)
        while self.text[position : position + 1] != "}":
            if values:
                position = self._pass(",", position)
            name, position = _DECODER.raw_decode(self.text, position)
            if not isinstance(name, str):
                raise json.JSONDecodeError("Expecting property name", self.text, position)
            position = self._pass(":", self.skip(position))
            below = f"{path}.{name}" if path else name
            values[name], position = self.value(position, below)
            position = self.skip(position)
        return values, position + 1

    def _list(self, position: int, path: str) -> tuple[JsonList, int]:
        starts = array("Q")
        position = self.skip(position + 1)
        text, decode, comma = self.text, _DECODER.raw_decode, _COMMA.match
        while text[position : position + 1] != "]" or starts:
            starts.append(position)
            _, position = decode(text, position)
            after = comma(text, position)
            if after is None:
                position = self.skip(position)
                if text[position : position + 1] != "]":
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
                break
            position = after.end()
        where = f"{self.location}: {path}" if path else self.location
        return JsonList(where, self.kind, self.text, starts), position + 1

    def _pass(self, sign: str, position: int) -> int:
        if self.text[position : position + 1] != sign:
            raise json.JSONDecodeError(f"Expecting {sign!r} delimiter", self.text, position)
        return self.skip(position + 1)


def _hash(identity: Identity) -> int:
    return xxhash.xxh3_64_intdigest(repr(identity).encode("utf-8", "backslashreplace"))


def _shown(value: Any) -> str:
    if isinstance(value, JsonList):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
