"""Typed settings: the base of every component's config, and how YAML becomes one.

A component owns a small frozen subclass of `Config` beside its code; a recipe is made of those.
Unknown keys, wrong types and impossible combinations raise ConfigError naming the key, what was
found and what is allowed.
"""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import storage
from pipeline.errors import ConfigError


class Config(BaseModel):
    """A frozen settings object that refuses unknown keys. Derived values are methods.

    A field that holds another config, with no word of its own on `Change`, is a group: its settings
    are named by dotted keys. `moved` says of a key of earlier releases where it is in this one.
    """

    moved: ClassVar[Mapping[str, str]] = {}

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=False, validate_default=True, allow_inf_nan=False
    )


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


def change_of(config: type[Config], key: str) -> Change:
    """Returns what the annotation of a setting says; one of a run's settings must say it."""
    *groups, name = key.split(".")
    for group in groups:
        inner = _group(config, group)
        assert inner is not None, key
        config = inner
    return next(mark for mark in config.model_fields[name].metadata if isinstance(mark, Change))


def settings(config: type[Config]) -> Iterator[str]:
    """Yields the dotted key of every setting, groups gone through."""
    for name in config.model_fields:
        group = _group(config, name)
        if group is None:
            yield name
        else:
            yield from (f"{name}.{key}" for key in settings(group))


def value_at(document: Mapping[str, Any], key: str) -> Any:
    """Returns what plain data has at a dotted key, or raises KeyError."""
    node: Any = document
    for part in key.split("."):
        if not isinstance(node, Mapping):
            raise KeyError(key)
        node = node[part]
    return node


def selected(document: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Returns plain data with what is at these dotted keys alone; those it lacks are left out."""
    result: dict[str, Any] = {}
    for key in keys:
        with contextlib.suppress(KeyError):
            value = value_at(document, key)
            *groups, name = key.split(".")
            node = result
            for group in groups:
                node = node.setdefault(group, {})
            node[name] = value
    return result


def as_now(config: type[Config], document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns plain data of an earlier release with its keys where `config.moved` has them."""
    result = {name: value for name, value in document.items() if name not in config.moved}
    for name, key in config.moved.items():
        if name in document:
            group, _, inner = key.partition(".")
            result[group] = {**result.get(group, {}), inner: document[name]}
    return result


def _group(config: type[Config], name: str) -> type[Config] | None:
    """Returns the config that a group's field holds; None if the field is a setting."""
    field = config.model_fields[name]
    held: Any = field.annotation
    is_setting = any(isinstance(mark, Change) for mark in field.metadata)
    return held if _is_config(held) and not is_setting else None


def load(config: type[ConfigT], location: str, overrides: Sequence[str] = ()) -> ConfigT:
    """Reads a YAML file, applies `dotted.key=value` overrides, and checks the result."""
    return check(config, overridden(read(location), overrides), location)


def read(location: str) -> dict[str, Any]:
    """Returns the keys of a YAML file as plain data, or raises ConfigError."""
    document = _parsed(storage.read_bytes(location), location)
    if not isinstance(document, dict):
        raise ConfigError(
            f"{location}: expected a mapping of keys, found {type(document).__name__}"
        )
    return document


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


class _Loader(yaml.SafeLoader):
    """YAML's safe types; a key that a mapping has twice is an error, not the last of its values."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        # Here, because `<<` later puts the keys that it merges beside those that override them.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != _MERGE:
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value!r} is given twice",
                        key_node.start_mark,
                    )  # fmt: skip
                seen.add(key_node.value)
        return node


_MERGE = "tag:yaml.org,2002:merge"  # of `<<`, whose keys those beside it override
_MAX_VALUES = 100_000  # of a document, with aliases written out
_MAX_DEPTH = 50
_MAX_BYTES = 1 << 24


def _parsed(text: bytes | str, where: str) -> Any:
    """Returns what YAML holds, or raises ConfigError naming where it is."""
    if len(text) > _MAX_BYTES:
        raise ConfigError(
            f"{where}: found {len(text)} bytes, more than the {_MAX_BYTES} of the largest recipe "
            "that is read; is it one?"
        )
    try:
        document = yaml.load(text, _Loader)  # a safe one
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: not valid YAML: nested too deeply") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        # PyYAML's own of a value it cannot make: 5,000 digits, a 31st of February, `!!bool no-one`
        fault = str(error).partition(";")[0]
        raise ConfigError(f"{where}: not valid YAML: a value cannot be read: {fault}") from error
    _num_values(document, where, {}, 0)
    return document


def _num_values(value: Any, where: str, known: dict[int, int], depth: int) -> int:
    """Counts the values in a document; raises ConfigError if they are too many, or too deep.

    Aliases make one value stand in many places, or within itself, at no cost in the file.
    """
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{where}: {value!r:.80} holds half a surrogate pair") from error
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        if depth > _MAX_DEPTH:
            raise ConfigError(
                f"{where}: values are nested over {_MAX_DEPTH} deep, or an alias stands within "
                "its own anchor"
            )
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_num_values(part, where, known, depth + 1) for part in parts)
    if known[id(value)] > _MAX_VALUES:
        raise ConfigError(
            f"{where}: holds over {_MAX_VALUES} values once its aliases are written out"
        )
    return known[id(value)]


def _override(document: dict[str, Any], override: str) -> dict[str, Any]:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"override {_shown(override)}: expected dotted.key=value")
    value = _parsed(text, f"override {_shown(override)}")
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
        owners = _configs_at(config, list(fault["loc"][:-1]))
        for owner in owners:
            if path[-1] in owner.moved:
                moved = ".".join(map(str, [*path[:-1], owner.moved[path[-1]]]))
                return f"{key}: an earlier release's key; it is {moved} now"
        allowed = sorted({name for owner in owners for name in owner.model_fields})
        close = difflib.get_close_matches(str(path[-1]), allowed, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        listing = f"allowed: {', '.join(allowed)}" if allowed else "it is not a known key"
        return f"{key}: unknown key; {hint}{listing}"
    if fault["type"] == "missing":
        return f"{key}: missing; it has no default and must be given"
    message = fault["msg"].removeprefix("Value error, ")
    if isinstance(found, dict | list):
        return f"{key}: {message}"
    return f"{key}: found {_shown(found)}; {message}"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # of an integer of thousands of digits, which has no decimal form
        text = f"a number of {value.bit_length()} bits"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


_MAX_SHOWN = 200  # characters of a value in a message


def _is_tag(location: tuple[int | str, ...], index: int) -> bool:
    """Pydantic puts the chosen member of a tagged union into the path; users never wrote it."""
    part, before = location[index], [name for name in location[:index] if isinstance(name, str)]
    return isinstance(part, str) and before[-1:] in _TAGGED_FIELDS and part != "type"


_TAGGED_FIELDS = (["source"], ["sources"], ["extractor"])


def _configs_at(config: Any, path: list[Any]) -> list[type[Config]]:
    """Returns the configs that may stand at `path`, walking through unions by their tag."""
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
    return [candidate for candidate in _members(node) if _is_config(candidate)]


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
