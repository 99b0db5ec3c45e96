"""Names of published weights: tables that say which of their tensors make each of ours.

A family keeps its own tables beside its code, composed of the pieces here. `load` and `export`
apply them in either direction, tensors to tensors; no other code touches names.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.models.base import ModelConfig

Names = dict[str, tuple[str, ...]]  # our parameter: their tensors, stacked along the first axis


@dataclass(frozen=True)
class Layout:
    """How one kind of file spells a family's parameters."""

    prefix: str  # of the encoder's tensors; a file of the encoder alone may leave it out
    names: Names
    tied: Mapping[str, str] = field(default_factory=dict)  # second names: first names
    optional: tuple[str, ...] = ()  # our modules that a file may lack, each as a whole
    ignored: tuple[str, ...] = ()  # beginnings of their names that have no place in our model


@dataclass(frozen=True)
class LoadReport:
    """What a file did for a model."""

    loaded: tuple[str, ...]  # our parameters that came from the file
    new: tuple[str, ...]  # our parameters that keep their initialisation
    ignored: tuple[str, ...]  # their tensors that were left out, as the layout or the caller says


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
            f"weights do not fit {type(model).__name__} ({len(faults)} faults); modules that "
            "should keep their initialisation can be named as fresh\n" + "\n".join(sorted(faults))
        )
    with torch.no_grad():
        for name in loaded:
            parameters[name].copy_(torch.cat([given[other] for other in layout.names[name]]))
    return LoadReport(tuple(loaded), tuple(new), tuple(ignored))


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
    dropout = document.get("hidden_dropout_prob", 0.1)
    require(document, "hidden_act", "gelu")
    require(document, "layer_norm_eps", 1e-12)
    require(document, "attention_probs_dropout_prob", dropout)
    return {
        "vocab_size": document.get("vocab_size", 30522),
        "width": document.get("hidden_size", 768),
        "num_heads": document.get("num_attention_heads", 12),
        "intermediate_size": document.get("intermediate_size", 3072),
        "max_positions": document.get("max_position_embeddings", 512),
        "type_vocab_size": document.get("type_vocab_size", 2),
        "dropout": dropout,
        "initializer_range": document.get("initializer_range", 0.02),
    }


def require(document: Mapping[str, Any], key: str, value: Any) -> None:
    """Raises ModelError if a `config.json` sets a key to anything but the one value we compute."""
    found = document.get(key, value)
    if found != value:
        raise ModelError(f"config.json: {key} is {found!r}; this family is computed with {value!r}")


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
        return int(document["num_answers"])
    if any("QuestionAnswering" in name for name in document.get("architectures") or ()):
        return len(document.get("id2label") or (0, 1))
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
