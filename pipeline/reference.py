"""The reference of a recipe's keys: what each means, may be, is by default, and does when changed.

Made of what the configs' fields say of themselves. `explained` puts it as comments into a resolved
recipe, which stays one; `page` makes docs/recipe.md of it.
"""

import inspect
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from pipeline.config import Change, Config
from pipeline.models.families import FAMILIES
from pipeline.recipe import Recipe
from pipeline.training.spec import TrainingSpec

_WIDTH = 100
_SIZES = "model.sizes"  # plain data in a recipe, of which the family's config knows the keys

_CHANGES = {
    Change.FREELY: "a run goes on with another value",
    Change.ON_REQUEST: "a run goes on with another value only with --from-checkpoint",
    Change.NEVER: "another value makes it another run",
}

_TABLE_HEAD = ("| key | meaning | allowed | default | change |", "|---|---|---|---|---|")
_HEAD = """\
# The keys of a recipe

`sightline run RECIPE --print-recipe --explain` prints a recipe with every key filled in and this
page's words as comments. This page is made by `make reference`.

Change says what a run that was begun does with another value: it goes on (**freely**), goes on as a
new stretch with `--from-checkpoint` (**on request**), or refuses, for it would be another run
(**never**). A key without is not part of training's record.
"""


def explained(recipe: Recipe) -> str:
    """Returns the resolved recipe as YAML, with what each key means as comments."""
    lines = [*_mapping(recipe, recipe.model_dump(mode="json"), "")]
    return "\n".join(lines).lstrip("\n") + "\n"


def configs() -> dict[type[Config], list[str]]:
    """Returns every config that a recipe may hold, with the keys where."""
    places: dict[type[Config], list[str]] = {}
    _collect(Recipe, "", places)
    for name, family in FAMILIES.items():
        places.setdefault(family.config, []).append(f"{_SIZES}` of `family: {name}")
    return places


def page() -> str:
    """Returns docs/recipe.md."""
    parts = [_HEAD]
    for config, keys in configs().items():
        if not config.model_fields:
            continue
        kinds = _kinds(config)
        title = ", ".join(f"`{key}`" for key in keys) or "The top"
        title += f" of `type: {kinds[0]}`" if kinds else ""
        doc = " ".join(inspect.cleandoc(config.__doc__ or "").split("\n\n")[0].split("\n"))
        rows = [
            f"| `{name}` | {_cell(_sentence(field))} | {_cell(allowed(field))} "
            f"| {_cell(_default(field))} | {_change_word(field, name, keys)} |"
            for name, field in config.model_fields.items()
        ]
        table = "\n".join(
            ["| key | meaning | allowed | default | change |", "|" + "---|" * 5, *rows]
        )
        parts.append(f"## {title}\n\n{doc}\n\n{table}\n")
    return "\n".join(parts)


def allowed(field: FieldInfo) -> str:
    """Says which values a field takes."""
    return _allowed(field.annotation, field.metadata)


def change(field: FieldInfo, key: str) -> Change | None:
    """Returns what another value at the recipe's key does to a run; None: nothing of training."""
    marks = [mark for mark in field.metadata if isinstance(mark, Change)]
    for of_spec in TrainingSpec.model_fields.values():
        if of_spec.title == key:
            marks += [mark for mark in of_spec.metadata if isinstance(mark, Change)]
    return marks[0] if marks else None


def _mapping(config: Config, document: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, field in type(config).model_fields.items():
        key = f"{prefix}{name}"
        yield from _comment(field, key)
        held, value = getattr(config, name), document[name]
        if key == _SIZES and value:
            yield f"{name}:"
            yield from _indented(_sizes(str(document["family"]), value))
        elif isinstance(held, Config) and value:
            yield f"{name}:"
            yield from _indented(_mapping(held, value, f"{key}."))
        elif isinstance(held, Sequence) and held and isinstance(held[0], Config):
            yield f"{name}:"
            for item, plain in zip(held, value, strict=True):
                first, *rest = list(_mapping(item, plain, f"{key}."))
                yield f"- {first}"
                yield from _indented(rest)
        else:
            yield from _plain({name: value})


def _sizes(family: str, document: Mapping[str, Any]) -> Iterator[str]:
    fields = FAMILIES[family].config.model_fields
    for name, value in document.items():
        yield from _comment(fields[name], f"{_SIZES}.{name}")
        yield from _plain({name: value})


def _comment(field: FieldInfo, key: str) -> Iterator[str]:
    facts = [allowed(field)] if not _holds_configs(field.annotation) else []
    default = _default(field)
    facts += [f"default: {default}"] if default and "{" not in default else []
    mark = change(field, key)
    facts += [_CHANGES[mark]] if mark else []
    said = f"{_sentence(field)} ({'; '.join(facts)})" if facts else _sentence(field)
    yield from textwrap.wrap(
        said, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
    )


def _plain(document: Mapping[str, Any]) -> list[str]:
    text = yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True, width=math.inf)
    return text.rstrip("\n").split("\n")


def _indented(lines: Iterator[str] | Sequence[str]) -> Iterator[str]:
    return (f"  {line}" for line in lines)


def _sentence(field: FieldInfo) -> str:
    return field.description or ""


def _default(field: FieldInfo) -> str:
    """Returns the default as YAML writes it; empty if there is none and the key must be given."""
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Config):
        return "{…}" if type(value).model_fields else "{}"
    plain = list(value) if isinstance(value, tuple) else value
    dumped = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=math.inf)
    return str(dumped).removesuffix("...\n").strip()


def _change_word(field: FieldInfo, name: str, keys: Sequence[str]) -> str:
    key = f"{keys[0]}.{name}" if keys else name
    mark = change(field, key)
    return mark.value if mark else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _collect(config: type[Config], prefix: str, places: dict[type[Config], list[str]]) -> None:
    """Notes where in a recipe each config stands, a config before what it holds."""
    places.setdefault(config, [])
    if prefix and prefix not in places[config]:
        places[config].append(prefix)
    for name, field in config.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        for held in _configs(field.annotation):
            _collect(held, key, places)


def _kinds(config: type[Config]) -> tuple[Any, ...]:
    """Returns the values of `type` by which a recipe chooses this config among others."""
    tag = config.model_fields.get("type")
    return get_args(tag.annotation) if tag else ()


def _configs(annotation: Any) -> list[type[Config]]:
    """Returns the configs that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [config for inner in get_args(annotation) for config in _configs(inner)]


def _holds_configs(annotation: Any) -> bool:
    return bool(_configs(annotation))


def _allowed(annotation: Any, marks: Sequence[Any] = ()) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _allowed(inner[0], [*marks, *inner[1:]])
    if origin in (Union, UnionType):
        others = dict.fromkeys(_allowed(one, marks) for one in inner if one is not NoneType)
        return " or ".join([*others, *(["null"] if NoneType in inner else [])])
    if origin is Literal:
        return ", ".join(_scalar(value) for value in inner)
    if origin is list or (origin is tuple and inner[-1] is Ellipsis):
        return f"list of {_allowed(inner[0])}"
    if origin is tuple:
        return f"list of {len(inner)}, each {_allowed(inner[0])}"
    if origin is dict:
        return f"mapping of names to {_allowed(inner[1])}" if inner[1] is not Any else "mapping"
    if annotation in (int, float):
        return " ".join(["whole number" if annotation is int else "number", *_bounds(marks)])
    if annotation is str:
        patterns = [mark.pattern for mark in _flat(marks) if getattr(mark, "pattern", None)]
        return f"text that matches `{patterns[0]}`" if patterns else "text"
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return "its keys"
    return "true, false" if annotation is bool else "any"


def _bounds(marks: Sequence[Any]) -> list[str]:
    found: dict[str, Any] = {}
    for mark in _flat(marks):
        for name in ("ge", "gt", "le", "lt", "multiple_of"):
            if getattr(mark, name, None) is not None:
                found[name] = getattr(mark, name)
    if "ge" in found and "le" in found:
        return [f"from {found['ge']:g} to {found['le']:g}"]
    words = {"ge": "at least", "gt": "over", "le": "at most", "lt": "under"}
    words["multiple_of"] = "a multiple of"
    said = [f"{word} {found[name]:g}" for name, word in words.items() if name in found]
    return [" and ".join(said)] if said else []


def _flat(marks: Sequence[Any]) -> Iterator[Any]:
    for mark in marks:
        yield from mark.metadata if isinstance(mark, FieldInfo) else [mark]


def _scalar(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
