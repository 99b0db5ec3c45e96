"""The keys that a reader of settings knows, told from those that it passes over.

A library that refuses an unknown key in some sections only, as DeepSpeed does, is given its
settings in a mapping that remembers: what its reader has not asked for it does not know.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

_ABSENT = object()


class AskedFor(dict[str, Any]):
    """A mapping, with those in it, that remembers which keys its reader has asked for."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(
            {
                key: AskedFor(value) if isinstance(value, Mapping) else value
                for key, value in content.items()
            }
        )
        self._asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._asked.add(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # its own, so that `**` asks for each key: a model looks at all

    def get(self, key: str, default: Any = None) -> Any:
        self._asked.add(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        self._asked.add(key)
        return super().pop(key, *default)

    def not_asked_for(self) -> list[str]:
        """Says of each key of the two upper levels that was not asked for which ones were.

        What is below them is read when it is first used.
        """
        faults = [
            f"{key}: {_unknown(key, sorted(self._asked))}" for key in self.keys() - self._asked
        ]
        for section, below in self.items():
            if isinstance(below, AskedFor) and below._asked:
                faults += [
                    f"{section}.{key}: {_unknown(key, sorted(below._asked))}"
                    for key in below.keys() - below._asked
                ]
        return sorted(faults)


def invalid(
    error: ValidationError, given: Mapping[str, Any], base: type[BaseModel]
) -> Sequence[str]:
    """Says what a model of a section, which is of a class below `base`, found in settings."""
    faults = []
    for fault in error.errors():
        tail = [str(part) for part in fault["loc"]]
        where = ".".join(_path_to(tail, given) or tail)
        if fault["type"] == "extra_forbidden":
            faults.append(f"{where}: {_unknown(tail[-1], _fields(base, error.title, tail[:-1]))}")
        else:
            faults.append(f"{where}: found {fault.get('input')!r}; {fault['msg']}")
    return faults


def _path_to(tail: Sequence[str], given: Mapping[str, Any]) -> Sequence[str]:
    """Returns the keys from the top to what a section of the settings calls `tail`, if it is."""
    node: Any = given
    for name in tail:
        node = node.get(name, _ABSENT) if isinstance(node, Mapping) else _ABSENT
    if node is not _ABSENT:
        return tail
    for name, below in given.items():
        if isinstance(below, Mapping):
            path = _path_to(tail, below)
            if path:
                return (name, *path)
    return ()


def _fields(base: type[BaseModel], title: str, parents: Sequence[str]) -> list[str]:
    """Returns the keys that a model, by its name, knows below `parents`."""
    models: list[Any] = [base]
    for model in models:  # grows: those below these
        models += model.__subclasses__()
    found = next((model for model in models if model.__name__ == title), None)
    for parent in parents:
        field = found.model_fields.get(parent) if found is not None else None
        below = [] if field is None else [field.annotation, *get_args(field.annotation)]
        found = next((one for one in below if hasattr(one, "model_fields")), None)
    if found is None:
        return []
    return sorted(field.alias or name for name, field in found.model_fields.items())


def _unknown(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=3)
    if near:
        return f"unknown key; did you mean {' or '.join(map(repr, near))}?"
    return f"unknown key; known are {', '.join(known)}" if known else "unknown key"
