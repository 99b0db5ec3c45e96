"""Typed settings: the base of every component's config, and how YAML becomes one.

A component owns a small frozen subclass of `Config` beside its code; a recipe is made of those.
Unknown keys, wrong types and impossible combinations raise ConfigError naming the key, what was
found and what is allowed.
"""

import difflib
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import storage
from pipeline.errors import ConfigError


class Config(BaseModel):
    """A frozen settings object that refuses unknown keys. Derived values are methods."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True)


ConfigT = TypeVar("ConfigT", bound=Config)


class Change(Enum):
    """What a run that is gone on with does about a setting that is not what it was.

    A field says it in its annotation: `steps: OnRequest[PositiveInt]`.
    """

    FREELY = "freely"  # the curve does not depend on it, but for rounding
    ON_REQUEST = "on request"  # the curve may go on from a checkpoint, as a new stretch
    NEVER = "never"  # it would be the curve of another run


Setting = TypeVar("Setting")
Free = Annotated[Setting, Change.FREELY]
OnRequest = Annotated[Setting, Change.ON_REQUEST]
Fixed = Annotated[Setting, Change.NEVER]


def change_of(config: type[Config], name: str) -> Change:
    """Returns what the field's annotation says; a field of a run's settings must say it."""
    return next(mark for mark in config.model_fields[name].metadata if isinstance(mark, Change))


def load(config: type[ConfigT], location: str, overrides: Sequence[str] = ()) -> ConfigT:
    """Reads a YAML file, applies `dotted.key=value` overrides, and checks the result."""
    try:
        document = yaml.safe_load(storage.read_bytes(location))
    except yaml.YAMLError as error:
        raise ConfigError(f"{location}: not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(
            f"{location}: expected a mapping of keys, found {type(document).__name__}"
        )
    return check(config, overridden(document, overrides), location)


def check(config: type[ConfigT], document: Mapping[str, Any], where: str) -> ConfigT:
    """Turns plain data into a config, or raises ConfigError listing every fault at once."""
    try:
        return config.model_validate(document)
    except ValidationError as error:
        faults = [_fault(config, fault) for fault in error.errors()]
        raise ConfigError("\n".join(f"{where}: {fault}" for fault in faults)) from None


def to_yaml(config: Config) -> str:
    """Returns the config with every default filled in, as YAML that `load` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def overridden(document: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns plain data with `dotted.key=value` put in, one after the other."""
    for override in overrides:
        document = _override(document, override)
    return document


def _override(document: dict[str, Any], override: str) -> dict[str, Any]:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"override {override!r}: expected dotted.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value") from error
    *parents, last = name.split(".")
    result = dict(document)
    node = result
    for parent in parents:
        child = node.get(parent)
        node[parent] = dict(child) if isinstance(child, dict) else {}
        node = node[parent]
    node[last] = value
    return result


def _fault(config: type[Config], fault: Any) -> str:
    """Renders one of pydantic's errors as: key, what was found, what is allowed."""
    location = fault["loc"]
    path = [part for index, part in enumerate(location) if not _is_tag(location, index)]
    key = ".".join(str(part) for part in path) or "recipe"
    found = fault.get("input")
    if fault["type"] == "extra_forbidden":
        allowed = _allowed_keys(config, list(fault["loc"][:-1]))
        close = difflib.get_close_matches(str(path[-1]), allowed, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        listing = f"allowed: {', '.join(sorted(allowed))}" if allowed else "it is not a known key"
        return f"{key}: unknown key; {hint}{listing}"
    if fault["type"] == "missing":
        return f"{key}: missing; it has no default and must be given"
    message = fault["msg"].removeprefix("Value error, ")
    if isinstance(found, dict | list):
        return f"{key}: {message}"
    return f"{key}: found {found!r}; {message}"


def _is_tag(location: tuple[int | str, ...], index: int) -> bool:
    """Pydantic puts the chosen member of a tagged union into the path; users never wrote it."""
    part, before = location[index], [name for name in location[:index] if isinstance(name, str)]
    return isinstance(part, str) and before[-1:] in _TAGGED_FIELDS and part != "type"


_TAGGED_FIELDS = (["source"], ["sources"], ["extractor"])


def _allowed_keys(config: Any, path: list[Any]) -> list[str]:
    """Returns the keys of the config found at `path`, walking through unions by their tag."""
    node: Any = config
    for part in path:
        if isinstance(part, int):  # of a list, whose members the annotation already names
            continue
        candidates = [candidate for candidate in _members(node) if _is_config(candidate)]
        tagged = [
            candidate
            for candidate in candidates
            if "type" in candidate.model_fields
            and part in get_args(candidate.model_fields["type"].annotation)
        ]
        if tagged:
            node = tagged[0]
            continue
        node = next(
            (
                candidate.model_fields[part].annotation
                for candidate in candidates
                if part in candidate.model_fields
            ),
            None,
        )
    names: set[str] = set()
    for candidate in _members(node):
        if _is_config(candidate):
            names |= set(candidate.model_fields)
    return sorted(names)


def _members(annotation: Any) -> list[Any]:
    """Flattens unions, containers and Annotated into the types they mention."""
    origin = get_origin(annotation)
    if origin is None:
        return [annotation]
    if origin is Union or get_args(annotation):
        return [member for argument in get_args(annotation) for member in _members(argument)]
    return [annotation]


def _is_config(candidate: Any) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, Config)
