"""Names of published weights: tables of which of their tensors make each of ours.

A family keeps its own tables beside its code, composed of the pieces here. `load`, `take_over` and
`export` apply them in either direction, tensors to tensors; no other code touches names.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.models.base import ModelConfig

MOST_LISTED = 20  # faults that an error names

Names = dict[str, tuple[str, ...]]  # our parameter: their tensors, stacked along the first axis


@dataclass(frozen=True)
class Layout:
    """How one kind of file spells a family's parameters."""

    prefix: str  # of the encoder's tensors; a file of the encoder alone may leave it out
    names: Names
    tied: Mapping[str, str] = field(default_factory=dict)  # second names: first names
    optional: tuple[str, ...] = ()  # our modules that a file may lack, each as a whole
    ignored: tuple[str, ...] = ()  # beginnings of their names that have no place in our model
    made_with: Mapping[str, Any] = field(default_factory=dict)  # our settings that no shape tells


@dataclass(frozen=True)
class LoadReport:
    """What a file did for a model."""

    loaded: tuple[str, ...]  # our parameters that came from the file
    new: tuple[str, ...]  # our parameters that keep their initialisation
    ignored: tuple[str, ...]  # their tensors that were left out
    misshaped: tuple[str, ...] = ()  # of those left out, which have other sizes than ours, and both

    def to_json(self) -> dict[str, Any]:
        """Returns counts and names, those that differ by a number only as one."""
        return {
            "taken": len(self.loaded),
            "new": len(self.new),
            "left_out": len(self.ignored),
            "new_parameters": grouped(self.new),
            "left_out_tensors": grouped(self.ignored),
            "misshaped": list(self.misshaped),
        }

    def summary(self) -> str:
        """Returns the same in a line."""
        told = [f"{len(self.loaded)} parameters taken over"]
        if self.new:
            told.append(f"{len(self.new)} new: {', '.join(grouped(self.new))}")
        if self.ignored:
            told.append(f"{len(self.ignored)} left out: {', '.join(grouped(self.ignored))}")
        if self.misshaped:
            told.append(f"of other sizes: {', '.join(self.misshaped)}")
        return "; ".join(told)


def load(
    layout: Layout, model: nn.Module, tensors: Mapping[str, Tensor], fresh: Sequence[str] = ()
) -> LoadReport:
    """Copies a file's tensors into a model, in place.

    `fresh` names modules of ours (`answer_head`) that keep their initialisation whatever the file
    holds. Raises ModelError that names every missing, unexpected and mis-shaped tensor.
    """
    given = _modern(layout, tensors)
    parameters = dict(model.named_parameters())
    absent = [module for module in layout.optional if not _spelled(layout, module) & set(given)]
    new = [name for name in parameters if _under(name, (*fresh, *absent))]
    loaded = [name for name in parameters if name not in set(new)]
    faults = _untied(layout, given)
    for name in loaded:
        theirs, shape = layout.names[name], parameters[name].shape
        expected = (shape[0] // len(theirs), *shape[1:])
        for other in theirs:
            if other not in given:
                faults.append(f"missing: {other}")
            elif given[other].shape != expected:
                faults.append(
                    f"mis-shaped: {other} is {tuple(given[other].shape)}, expected {expected}"
                )
    used = {other for name in loaded for other in layout.names[name]} | set(layout.tied)
    left_out = {other for module in fresh for other in _spelled(layout, module)}
    ignored = []
    for other in sorted(set(given) - used):
        if other in left_out or other.startswith(layout.ignored):
            ignored.append(other)
        else:
            faults.append(f"unexpected: {other}")
    if faults:
        raise ModelError(
            f"weights do not fit {type(model).__name__} ({len(faults)} faults)\n{_listed(faults)}"
        )
    _fill(parameters, loaded, layout, given)
    return LoadReport(tuple(loaded), tuple(new), tuple(ignored))


def take_over(
    layout: Layout, model: nn.Module, tensors: Mapping[str, Tensor], fresh: Sequence[str] = ()
) -> LoadReport:
    """Copies what fits of somebody else's weights into a model, in place, and tells the rest.

    A head that the file lacks, holds in part or has in another size is new, as are layers beyond
    the file's and, where features have another width, the map that reads them; what has no place
    in the model is left out. Raises ModelError for what would be a surprise: nothing of the encoder
    is there, a layer is incomplete, a size is another, or the vocabulary is.
    """
    given = _modern(layout, tensors)
    parameters = dict(model.named_parameters())
    faults = _untied(layout, given)
    new = {name for name in parameters if name not in layout.names or _under(name, fresh)}
    units: dict[str, list[str]] = {}
    for name in parameters:
        if name not in new:
            units.setdefault(_unit(layout, name), []).append(name)
    misshaped = {}
    for unit, names in units.items():
        theirs = [other for name in names for other in layout.names[name]]
        absent = [other for other in theirs if other not in given]
        may_lack = unit in layout.optional or (unit[-1].isdigit() and len(absent) == len(theirs))
        if absent and may_lack:
            new |= set(names)
        elif absent:
            faults += [f"missing: {other}" for other in absent]
        for name in names:
            if name in new or any(other in absent for other in layout.names[name]):
                continue
            found, expected = _shapes(layout, name, parameters[name], given)
            if found == expected:
                continue
            said = f"{layout.names[name][0]} is {found}, expected {expected}"
            if name.endswith(_VOCABULARY):
                faults.append(
                    f"its vocabulary has {found[0]} words, and the tokenizer has {expected[0]}; "
                    "give the one that these weights were trained with, as `model.tokenizer`"
                )
            elif unit in layout.optional or name.startswith(_SEES_FEATURES):
                misshaped[name] = said
            else:
                faults.append(f"mis-shaped: {said}; sizes are set by `model.sizes`")
    of_linear = {name.rpartition(".")[0] for name in misshaped}
    new |= {name for name in parameters if name.rpartition(".")[0] in of_linear}
    loaded = [name for name in parameters if name not in new]
    encoder = [name for name in parameters if _IN_ENCODER.match(name)]
    if encoder and new.issuperset(encoder):
        expected_names = [other for name in encoder for other in layout.names.get(name, ())]
        faults = [
            f"nothing of its encoder is there: it holds {', '.join(sorted(tensors)[:3])} …, "
            f"expected names such as {', '.join(expected_names[:2])}"
        ]
    if faults:
        raise ModelError(f"these weights cannot start {type(model).__name__}: {_listed(faults)}")
    _fill(parameters, loaded, layout, given)
    used = {other for name in loaded for other in layout.names[name]} | set(layout.tied)
    return LoadReport(
        tuple(loaded),
        tuple(name for name in parameters if name in new),
        tuple(sorted(set(given) - used)),
        tuple(misshaped.values()),
    )


_VOCABULARY = "text_embeddings.word.weight"
# What reads features: it has their width, which is their extractor's.
_SEES_FEATURES = (
    "visual_embeddings.projection.",
    "region_embeddings.feature.",
    "region_embeddings.mask.",
    "visual.",
)
_IN_ENCODER = re.compile(r"(\w+_)?layers\.|connections\.|decoder\.")


def grouped(names: Iterable[str]) -> list[str]:
    """Returns names, as one those that are the same up to a number, or up to their last part.

    Each comes with how many they are: `layers.6-11 (96)`, `answer_head.out (2)`.
    """
    counts: Counter[str] = Counter()
    numbers: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
        stem = ".".join(parts[:number] if number else parts[: max(1, len(parts) - 1)])
        counts[stem] += 1
        if number:
            numbers.setdefault(stem, set()).add(int(parts[number]))
    return [
        f"{stem}{'.' + _ranges(numbers[stem]) if stem in numbers else ''} ({count})"
        for stem, count in counts.items()
    ]


def _ranges(numbers: set[int]) -> str:
    """Returns `0-5,8` for 0 … 5 and 8."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ",".join("-".join(map(str, one)) for one in ranges)


def _unit(layout: Layout, name: str) -> str:
    """Returns the module that a file has as a whole or not at all: a head, a layer, a table."""
    optional = next((module for module in layout.optional if _under(name, (module,))), None)
    if optional is not None:
        return optional
    first, *others = name.split(".")
    return f"{first}.{others[0]}" if others and others[0].isdigit() else first


def _shapes(
    layout: Layout, name: str, parameter: Tensor, given: Mapping[str, Tensor]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shape of the first of theirs that does not fit, if any, and the right one."""
    theirs = layout.names[name]
    expected = (parameter.shape[0] // len(theirs), *parameter.shape[1:])
    shapes = [tuple(given[other].shape) for other in theirs]
    return next((shape for shape in shapes if shape != expected), expected), expected


def _fill(
    parameters: Mapping[str, Tensor],
    names: Iterable[str],
    layout: Layout,
    given: Mapping[str, Tensor],
) -> None:
    with torch.no_grad():
        for name in names:
            if not parameters[name].is_meta:
                parameters[name].copy_(torch.cat([given[other] for other in layout.names[name]]))


def _listed(faults: Iterable[str]) -> str:
    """Returns the first faults, and how many more there are."""
    listed = sorted(faults)
    more = [f"and {len(listed) - MOST_LISTED} more"] if len(listed) > MOST_LISTED else []
    return "\n".join([*listed[:MOST_LISTED], *more])


def export(layout: Layout, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames parameters, as `named_parameters` gives them, to the layout's tensors.

    Tied second names are left out, as safetensors files leave them out.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        theirs = layout.names[name]
        for other, part in zip(theirs, parameter.detach().chunk(len(theirs)), strict=True):
            tensors[other] = part.contiguous()
    return tensors


# The pieces that BERT's descendants share.


def linear(ours: str, *theirs: str) -> Names:
    """A Linear or LayerNorm; several of theirs may be one of ours."""
    return {
        f"{ours}.{part}": tuple(f"{name}.{part}" for name in theirs) for part in ("weight", "bias")
    }


def table(ours: str, theirs: str) -> Names:
    """An Embedding."""
    return {f"{ours}.weight": (f"{theirs}.weight",)}


def text_embeddings(ours: str, norm: str, theirs: str) -> Names:
    """Word, position and segment tables and the norm after them."""
    return {
        **table(f"{ours}.word", f"{theirs}.word_embeddings"),
        **table(f"{ours}.position", f"{theirs}.position_embeddings"),
        **table(f"{ours}.token_type", f"{theirs}.token_type_embeddings"),
        **linear(norm, f"{theirs}.LayerNorm"),
    }


def qkv(ours: str, theirs: str, suffix: str = "") -> Names:
    """Three projections of theirs that are one of ours."""
    return linear(ours, *(f"{theirs}.{part}{suffix}" for part in ("query", "key", "value")))


def attention(ours: str, theirs: str, output: str) -> Names:
    """An attention with its output map and norm."""
    return {
        **qkv(f"{ours}.qkv", theirs),
        **linear(f"{ours}.out", f"{output}.dense"),
        **linear(f"{ours}.norm", f"{output}.LayerNorm"),
    }


def feed_forward(ours: str, intermediate: str, output: str) -> Names:
    """A feed-forward with its norm."""
    return {
        **linear(f"{ours}.up", f"{intermediate}.dense"),
        **linear(f"{ours}.down", f"{output}.dense"),
        **linear(f"{ours}.norm", f"{output}.LayerNorm"),
    }


def transformer_layers(ours: str, theirs: str, num_layers: int) -> Names:
    """BERT's layers 0 … num_layers-1."""
    names: Names = {}
    for index in range(num_layers):
        mine, other = f"{ours}.{index}", f"{theirs}.{index}"
        names |= attention(
            f"{mine}.attention", f"{other}.attention.self", f"{other}.attention.output"
        )
        names |= feed_forward(f"{mine}.feed_forward", f"{other}.intermediate", f"{other}.output")
    return names


def transform(ours: str, theirs: str) -> Names:
    """A HeadTransform."""
    return {
        **linear(f"{ours}.dense", f"{theirs}.dense"),
        **linear(f"{ours}.norm", f"{theirs}.LayerNorm"),
    }


def answer_head(ours: str, theirs: str) -> Names:
    """An AnswerHead; theirs is a Sequential of four."""
    return {
        **linear(f"{ours}.up", f"{theirs}.0"),
        **linear(f"{ours}.norm", f"{theirs}.2"),
        **linear(f"{ours}.out", f"{theirs}.3"),
    }


def token_head(ours: str, theirs: str, embeddings: str) -> tuple[Names, dict[str, str]]:
    """BERT's `cls.predictions`: names, and what is tied (weight to embedding, bias to bias)."""
    names = {
        **transform(f"{ours}.transform", f"{theirs}.transform"),
        f"{ours}.decoder.bias": (f"{theirs}.bias",),
    }
    tied = {
        f"{theirs}.decoder.weight": f"{embeddings}.word_embeddings.weight",
        f"{theirs}.decoder.bias": f"{theirs}.bias",
    }
    return names, tied


def bert(
    *,
    text_norm: str,
    layers: str,
    num_layers: int,
    pooler: str | None,
    optional: tuple[str, ...],
    also: Names | None = None,
) -> Layout:
    """BERT's own files, which fill a model's text side; deeper layers than ours are left out.

    `also` lists what else begins as a copy of BERT's, `optional` what has no counterpart in it.
    """
    head_names, tied = token_head("token_head", "cls.predictions", "bert.embeddings")
    depth_limit = 48  # of any published BERT
    return Layout(
        prefix="bert.",
        names={
            **text_embeddings("text_embeddings", text_norm, "bert.embeddings"),
            **transformer_layers(layers, "bert.encoder.layer", num_layers),
            **(linear(f"{pooler}.dense", "bert.pooler.dense") if pooler else {}),
            **head_names,
            **(also or {}),
        },
        tied=tied,
        optional=("token_head", *((pooler,) if pooler else ()), *optional),
        ignored=(
            "cls.seq_relationship.",  # whether one sentence follows another
            *(() if pooler else ("bert.pooler.",)),
            *(f"bert.encoder.layer.{index}." for index in range(num_layers, depth_limit)),
        ),
    )


def own(parameters: Iterable[str]) -> Layout:
    """A family of our own, saved under our names; its heads may be absent."""
    return Layout(
        prefix="",
        names={name: (name,) for name in parameters},
        optional=("token_head", "match_head", "answer_head"),
    )


def bert_sizes(config: ModelConfig) -> dict[str, Any]:
    """Returns the sizes that every BERT-like `config.json` of transformers has."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": 1e-12,
        "initializer_range": config.initializer_range,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def from_bert_sizes(document: Mapping[str, Any]) -> dict[str, Any]:
    """Reads those sizes; what a `config.json` leaves out has BERT-base's value.

    Raises ModelError for an activation, norm or dropout that our blocks do not have.
    """
    dropout = number(document, "hidden_dropout_prob", 0.1)
    require(document, "hidden_act", "gelu")
    require(document, "layer_norm_eps", 1e-12)
    require(document, "attention_probs_dropout_prob", dropout)
    return {
        "vocab_size": whole(document, "vocab_size", 30522),
        "width": whole(document, "hidden_size", 768),
        "num_heads": whole(document, "num_attention_heads", 12),
        "intermediate_size": whole(document, "intermediate_size", 3072),
        "max_positions": whole(document, "max_position_embeddings", 512),
        "type_vocab_size": whole(document, "type_vocab_size", 2),
        "dropout": dropout,
        "initializer_range": number(document, "initializer_range", 0.02),
    }


def whole(document: Mapping[str, Any], key: str, default: int | None = None, least: int = 1) -> int:
    """Reads a count of a `config.json`, or raises ModelError; with no default it must be there."""
    found = document.get(key, default)
    if isinstance(found, bool) or not isinstance(found, int) or found < least:
        raise ModelError(
            f"config.json: {key} is {shortened(found)}; expected a whole number from {least}"
        )
    return found


def number(document: Mapping[str, Any], key: str, default: float) -> float:
    """Reads a fraction of a `config.json`, or raises ModelError."""
    found = document.get(key, default)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found < 1:
        raise ModelError(
            f"config.json: {key} is {shortened(found)}; expected a number from 0 to below 1"
        )
    return float(found)


def whole_numbers(document: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Reads a list of counts of a `config.json`, or raises ModelError."""
    found = document.get(key)
    if not isinstance(found, list | tuple) or not all(type(one) is int for one in found):
        raise ModelError(
            f"config.json: {key} is {shortened(found)}; expected a list of whole numbers"
        )
    return tuple(found)


def shortened(found: Any) -> str:
    """Returns what was found, cut where it is long."""
    said = "missing" if found is None else repr(found)
    return said if len(said) <= 60 else f"{said[:60]}…"


def require(document: Mapping[str, Any], key: str, value: Any) -> None:
    """Raises ModelError if a `config.json` sets a key to anything but the one value we compute."""
    found = document.get(key, value)
    if found != value:
        raise ModelError(
            f"config.json: {key} is {shortened(found)}; this family is computed with {value!r}"
        )


def labels(num_answers: int, answers: Iterable[str]) -> dict[str, Any]:
    """Returns the keys by which transformers knows an answer head; no names, no head: no keys."""
    named = list(answers) or [f"LABEL_{index}" for index in range(num_answers)]
    if len(named) != num_answers:
        raise ModelError(f"{len(named)} answers given for a model with num_answers={num_answers}")
    if not named:
        return {"num_answers": 0}
    return {
        "num_answers": num_answers,
        "id2label": {str(index): answer for index, answer in enumerate(named)},
        "label2id": {answer: index for index, answer in enumerate(named)},
    }


def num_answers(document: Mapping[str, Any]) -> int:
    """Reads the size of a `config.json`'s answer head; where it is not said, transformers has 2."""
    if "num_answers" in document:
        return whole(document, "num_answers", least=0)
    architectures = document.get("architectures") or ()
    if not isinstance(architectures, list | tuple):
        raise ModelError(
            f"config.json: architectures is {shortened(architectures)}; expected names"
        )
    if any("QuestionAnswering" in str(name) for name in architectures):
        named = document.get("id2label") or (0, 1)
        if not isinstance(named, Mapping | tuple):
            raise ModelError(
                f"config.json: id2label is {shortened(named)}; expected names by number"
            )
        return len(named)
    return 0


def _modern(layout: Layout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undoes what old files do.

    DataParallel adds `module.`, norms have gamma and beta, buffers of positions are kept, and an
    encoder saved alone has no prefix.
    """
    given = {}
    for theirs, tensor in tensors.items():
        name = theirs.removeprefix("module.")
        for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
            name = name.removesuffix(old) + new if name.endswith(old) else name
        if not name.endswith("position_ids"):
            given[name] = tensor
    if any(name.startswith(layout.prefix) for name in given):
        return given
    return {layout.prefix + name: tensor for name, tensor in given.items()}


def _spelled(layout: Layout, module: str) -> set[str]:
    """Returns their tensors that make a module of ours."""
    return {
        other for name in layout.names if _under(name, (module,)) for other in layout.names[name]
    }


def _untied(layout: Layout, given: Mapping[str, Tensor]) -> list[str]:
    """Our decoder shares its weight with the embedding, so a file's two copies must be equal."""
    return [
        f"unexpected: {second} differs from {first}, which ours shares"
        for second, first in layout.tied.items()
        if second in given and first in given and not torch.equal(given[second], given[first])
    ]


def _under(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)
