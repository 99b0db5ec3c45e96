"""Annotation files in JSON, as other people wrote them: read lazily, every field checked.

The large lists of such a file are kept as bytes, and an object of a list is parsed when it is
asked for: VQA's training annotations take 0.4 GB so, and 3 GB as Python objects. Memory is the
unpacked file and 64 bytes for each object of a list, 24 more where a list is grouped.

A file that is not JSON, or of another shape, is a SourceError. An object of a list that is not what
it should be costs itself: its list keeps what is wrong with it, and `rejects` lists it.
"""

import codecs
import json
import re
import reprlib
from array import array
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from pipeline import storage
from pipeline.data.sources.base import Reject, malformed
from pipeline.data.sources.readers.gzip_file import is_gzip, unpacked
from pipeline.data.tars.member_names import is_utf8
from pipeline.errors import SourceError

_SMALLEST, _LARGEST = -(1 << 63), (1 << 63) - 1  # numbers that JSON holds everywhere
Identity = Annotated[int, msgspec.Meta(ge=_SMALLEST, le=_LARGEST)] | str
S = TypeVar("S", bound=msgspec.Struct)
T = TypeVar("T")

_MAX_DETAILS = 10_000  # of faulty objects; what there is of more is wrong alike
_ANY: msgspec.json.Decoder[Any] = msgspec.json.Decoder()
_ELEMENTS = msgspec.json.Decoder(list[msgspec.Raw])
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


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
            raise SourceError(f"{where}: expected an object, found {shown(value)}")
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
        """Returns a number of 64 bits or a string."""
        value = self.get(name)
        if type(value) is str:
            return self.string(name)
        if type(value) is int and _SMALLEST <= value <= _LARGEST:
            return value
        raise self._wrong(name, "a number or a string", value)

    def string(self, name: str) -> str:
        """Returns a string that can be encoded as UTF-8."""
        value = self.get(name)
        if not isinstance(value, str):
            raise self._wrong(name, "a string", value)
        try:
            value.isascii() or value.encode()
        except UnicodeEncodeError as error:
            raise SourceError(
                f"{self.where}: {name!r}: {shown(value)} holds half a surrogate pair"
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
        return self.wrong(name, f"expected {expected}, found {shown(found)}")


@dataclass(frozen=True)
class JsonList:
    """A list of a JSON file, whose elements are parsed when they are asked for."""

    where: str  # such as `captions.json: annotations`
    kind: str
    # Unparsed, unless only Python's reader takes them.
    _elements: Sequence[Any] = field(repr=False)
    # What is wrong with the objects that were refused, by where they are.
    _faults: dict[str, str] = field(repr=False, compare=False, default_factory=dict)

    def __len__(self) -> int:
        return len(self._elements)

    def __getitem__(self, index: int) -> Any:
        """Returns an element, or raises SourceError if it cannot be parsed."""
        try:
            return _parsed(self._elements[index])
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{self.where}[{index}]: not valid JSON: {_why(error)}") from error

    def object(self, index: int) -> Fields:
        """Returns a view of an element, or raises SourceError if it is no object."""
        return Fields.of(self[index], f"{self.where}[{index}]", self.kind)

    def made(self, make: Callable[[int], T], indices: Iterable[int]) -> Iterator[T]:
        """Yields what `make` makes of elements, without those that it raises SourceError for."""
        for index in indices:
            try:
                found = make(index)
            except SourceError as error:
                self.refuse(f"{self.where}[{index}]", error)
            else:
                yield found

    def each(self, make: Callable[[Fields], T]) -> Iterator[T]:
        """Yields what `make` makes of the objects in their order, without those it refuses."""
        return self.checked(make, self.made(self.object, range(len(self))))

    def checked(self, make: Callable[[Fields], T], entries: Iterable[Fields]) -> Iterator[T]:
        """Yields what `make` makes of some of the objects, without those it refuses."""
        for entry in entries:
            try:
                found = make(entry)
            except SourceError as error:
                self.refuse(entry.where, error)
            else:
                yield found

    def refuse(self, where: str, error: SourceError) -> None:
        """Notes that the object at `where` cannot be used."""
        detail = str(error) if len(self._faults) < _MAX_DETAILS else f"{self.where}: as the others"
        self._faults.setdefault(where, detail)

    def rejects(self, split: str) -> Iterator[Reject]:
        """Yields a reject for each refused object, once all have been asked for.

        Raises SourceError if there is no other: then the file is not what it should be.
        """
        if self._faults and len(self._faults) == len(self):
            raise SourceError(next(iter(self._faults.values())))
        for where, detail in self._faults.items():
            yield malformed(where, split, detail)

    def reader(self, struct: type[S], checked: Callable[[Fields], S]) -> Callable[[int], S]:
        """Returns what makes structs of elements, in a fraction of the time that fields take.

        Of an element that does not fit, `checked` makes the struct, or raises what is wrong.
        """
        decode = msgspec.json.Decoder(struct).decode
        elements = self._elements

        def read(index: int) -> S:
            element = elements[index]
            if isinstance(element, msgspec.Raw):  # else Python's reader has parsed it already
                try:
                    return decode(element)
                except (msgspec.DecodeError, RecursionError):
                    pass  # it does not fit, or only the fields can say what is wrong
            return checked(self.object(index))

        return read

    def strings(self) -> list[str | None]:
        """Returns all elements, None for one that is no string that UTF-8 can hold."""
        values = list(self.made(self.__getitem__, range(len(self))))
        texts = [value if isinstance(value, str) and is_utf8(value) else None for value in values]
        if texts and not any(text is not None for text in texts):
            raise SourceError(f"{self.where}: expected strings, found {shown(values[0])}")
        return texts


class Groups:
    """The objects of a list by a field that identifies what they belong to.

    Objects that lack the field, or that cannot be parsed, are refused.
    """

    def __init__(self, items: JsonList, name: str) -> None:
        self._items = items
        self._name = name
        wanted = msgspec.defstruct("Wanted", [("value", Identity)], rename={"value": name})
        read = items.reader(wanted, lambda entry: wanted(entry.identity(name)))
        places, hashes = array("q"), array("q")
        for index in range(len(items)):
            for found in items.made(read, (index,)):
                places.append(index)
                hashes.append(hash(found.value))  # type: ignore[attr-defined]
        hashed = np.array(hashes, np.int64)
        order = np.argsort(hashed, kind="stable")
        self._order = np.array(places, np.int64)[order]
        self._hashes = hashed[order]
        self._sorted = self._hashes.data  # whose numbers are Python's: bisect is fast on it

    def of(self, identity: Identity) -> list[Fields]:
        """Returns the objects that name this identity, in the list's order."""
        found = self._items.made(self._items.object, self.places(identity))
        return [entry for entry in found if entry.identity(self._name) == identity]

    def made(self, make: Callable[[Fields], T], identity: Identity) -> Iterator[T]:
        """Yields what `make` makes of the objects of `of`, without those it refuses."""
        return self._items.checked(make, self.of(identity))

    def places(self, identity: Identity) -> list[int]:
        """Returns where in the list the objects of `of` are, and of others with the same hash."""
        hashed = hash(identity)
        start = bisect_left(self._sorted, hashed)
        stop = bisect_right(self._sorted, hashed, start)
        found: list[int] = self._order[start:stop].tolist()
        return found

    def __iter__(self) -> Iterator[tuple[Identity, list[Fields]]]:
        """Yields each identity with its objects, in the order of their first appearance."""
        return self.beside(())

    def beside(self, known: Collection[Identity]) -> Iterator[tuple[Identity, list[Fields]]]:
        """Yields what iteration does, without the known identities, whose objects stay unparsed."""
        starts = np.flatnonzero(np.diff(self._hashes, prepend=self._hashes[:1] ^ 1))
        stops = np.append(starts[1:], len(self._hashes))
        hashes = np.fromiter(map(hash, known), np.int64, len(known))
        unknown = np.flatnonzero(~np.isin(self._hashes[starts], hashes))
        for group in unknown[np.argsort(self._order[starts[unknown]])]:
            found: defaultdict[Identity, list[Fields]] = defaultdict(list)
            indices = self._order[starts[group] : stops[group]].tolist()
            for entry in self._items.made(self._items.object, indices):
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
                f"{self.location}: expected a list {'.'.join(path)!r}, found {shown(values)}. "
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
    """Returns a file of UTF-8, packed with gzip or not, its lines ended by "\\n" however they were.

    Raises SourceError if it is not that.
    """
    return _text(_unpacked(location), location).replace("\r\n", "\n").replace("\r", "\n")


def _unpacked(location: str) -> bytes:
    payload = storage.read_bytes(location)
    if is_gzip(payload):
        payload = unpacked(payload, location)
    return payload.removeprefix(codecs.BOM_UTF8)


def _text(payload: bytes, location: str) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError as error:
        line = payload.count(b"\n", 0, error.start) + 1
        hint = "convert it, for example with iconv"
        if payload.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            hint = "it is UTF-16: `iconv -f UTF-16 -t UTF-8` converts it"
        raise SourceError(f"{location}: line {line}: not UTF-8: {error}; {hint}") from error


def _read(location: str, kind: str) -> Any:
    payload = _unpacked(location)
    _text(payload, location)  # which checks it
    try:
        return _Opening(location, kind).value(msgspec.Raw(payload.lstrip()))
    except (msgspec.DecodeError, RecursionError):
        pass  # it may hold what Python's own reader takes, such as NaN; else that names the line
    try:
        return _Opening(location, kind).value(json.loads(payload))
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{location}: not valid JSON: {_why(error)}. Is it {kind}, and whole?"
        ) from error


def _why(error: Exception) -> str:
    """Returns what is wrong with JSON, by what a reader raised."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error).partition(";")[0]  # of 5,000 digits Python says how to read them


@dataclass(frozen=True)
class _Opening:
    """Takes a value's objects apart, down to their lists."""

    location: str
    kind: str

    def value(self, value: Any, path: str = "") -> Any:
        if isinstance(value, msgspec.Raw):
            raw, value = value, _opened(value)
            if isinstance(value, dict) and (name := _name_given_twice(raw, value)):
                raise SourceError(
                    f"{self.location}: {path or 'the file'} has {name!r} twice, of which one "
                    "would be lost; make one of them"
                )
        if isinstance(value, dict):
            below = f"{path}." if path else ""
            return {name: self.value(part, f"{below}{name}") for name, part in value.items()}
        if isinstance(value, list):
            where = f"{self.location}: {path}" if path else self.location
            return JsonList(where, self.kind, value)
        return value


def _opened(raw: msgspec.Raw) -> Any:
    """Returns a value, of which parts stay unparsed."""
    first = bytes(memoryview(raw)[:1])
    decoder = _FIELDS if first == b"{" else _ELEMENTS if first == b"[" else _ANY
    return decoder.decode(raw)


_NAME = re.compile(rb'\s*,?\s*("(?:[^"\\]|\\.)*")\s*:\s*')
_END = re.compile(rb"\s*}")


def _name_given_twice(raw: msgspec.Raw, fields: Mapping[str, msgspec.Raw]) -> str:
    """Returns a name that an object has twice, of which `fields` have the last value, or nothing.

    The object's text is gone through from name to name: what is between two is as long as a value.
    """
    text, place, name = memoryview(raw), 1, ""
    seen: set[str] = set()
    while found := _NAME.match(text, place):
        after = json.loads(found[1])
        if after in seen or after not in fields:
            return name if after not in fields else after
        name = after
        seen.add(name)
        place = found.end() + len(memoryview(fields[name]))
    return "" if _END.match(text, place) and len(seen) == len(fields) else name


def _parsed(element: Any) -> Any:
    if not isinstance(element, msgspec.Raw):
        return element
    try:
        return _ANY.decode(element)
    except msgspec.DecodeError:  # a number that is out of range, which Python takes for infinite
        return json.loads(bytes(element))


class _Shown(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:  # noqa: ARG002
        return repr(x) if x.bit_length() < 256 else f"a number of {x.bit_length()} bits"


_SHOWN = _Shown()
_SHOWN.maxstring = _SHOWN.maxother = 80


def shown(value: Any) -> str:
    """Returns a value as a message shows it: short, whatever it is."""
    if isinstance(value, JsonList):
        return f"a list of {len(value)}"
    text = _SHOWN.repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object of Python's JSON reader, or raises ValueError if a name stands twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        name = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{name!r} is given twice in one object")
    return values
