"""The families by name: what builds each, and which layouts of weights each can read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.models import (
    attention_fusion,
    late_fusion,
    layouts,
    lxmert,
    uniter,
    vilbert,
    visual_prefix,
    visualbert,
)
from pipeline.models.base import BACKBONE, ModelConfig, VisionLanguageModel
from pipeline.models.layouts import Layout, LoadReport


@dataclass(frozen=True)
class Family:
    """One way to fuse text and image."""

    config: type[Any]
    model: type[Any]  # of VisionLanguageModel, made from a config
    model_type: str  # in config.json; transformers' own where it has the family
    layouts: Mapping[str, Callable[[Any], Layout]]  # "saved" is the one we write
    to_document: Callable[[Any, Sequence[str]], dict[str, Any]]  # config, answers -> config.json
    from_document: Callable[[Mapping[str, Any]], Any]


def _own_family(
    name: str,
    config_type: type[ModelConfig],
    model: type[Any],
    others: Mapping[str, Callable[[Any], Layout]],
) -> Family:
    """A family that nobody else has: saved under our own names, its config as it stands.

    `others` are the layouts that it reads beside its own.
    """

    def layout(config: ModelConfig) -> Layout:
        with torch.device("meta"):  # only for its names, with every head there can be
            whole = model(config.model_copy(update={"num_answers": max(1, config.num_answers)}))
        return layouts.own(name for name, _ in whole.named_parameters())

    def to_document(config: ModelConfig, answers: Sequence[str]) -> dict[str, Any]:
        labels = layouts.labels(config.num_answers, answers)
        return {"model_type": name, **config.model_dump(), **labels}

    def from_document(document: Mapping[str, Any]) -> ModelConfig:
        fields = config_type.model_fields
        return config_type(**{key: value for key, value in document.items() if key in fields})

    return Family(
        config=config_type,
        model=model,
        model_type=name,
        layouts={"saved": layout, **others},
        to_document=to_document,
        from_document=from_document,
    )


FAMILIES: dict[str, Family] = {
    "visualbert": Family(
        config=visualbert.VisualBertConfig,
        model=visualbert.VisualBert,
        model_type="visual_bert",
        layouts={
            "saved": visualbert.transformers_layout,
            "bert": visualbert.bert_layout,
            "original": visualbert.original_layout,
        },
        to_document=visualbert.to_transformers,
        from_document=visualbert.from_transformers,
    ),
    "lxmert": Family(
        config=lxmert.LxmertConfig,
        model=lxmert.Lxmert,
        model_type="lxmert",
        layouts={
            "saved": lxmert.transformers_layout,
            "bert": lxmert.bert_layout,
            "original": lxmert.original_layout,
        },
        to_document=lxmert.to_transformers,
        from_document=lxmert.from_transformers,
    ),
    "vilbert": Family(
        config=vilbert.VilbertConfig,
        model=vilbert.Vilbert,
        model_type="vilbert",
        layouts={
            "saved": vilbert.original_layout,
            "bert": vilbert.bert_layout,
            "original": vilbert.original_layout,
        },
        to_document=vilbert.to_document,
        from_document=vilbert.from_document,
    ),
    "uniter": Family(
        config=uniter.UniterConfig,
        model=uniter.Uniter,
        model_type="uniter",
        layouts={
            "saved": uniter.original_layout,
            "bert": uniter.bert_layout,
            "original": uniter.original_layout,
        },
        to_document=uniter.to_document,
        from_document=uniter.from_document,
    ),
    "late_fusion": _own_family(
        "late_fusion",
        late_fusion.LateFusionConfig,
        late_fusion.LateFusion,
        {"bert": late_fusion.bert_layout},
    ),
    "attention_fusion": _own_family(
        "attention_fusion",
        attention_fusion.AttentionFusionConfig,
        attention_fusion.AttentionFusion,
        {"bert": attention_fusion.bert_layout},
    ),
    "visual_prefix": _own_family(
        "visual_prefix",
        visual_prefix.VisualPrefixConfig,
        visual_prefix.VisualPrefix,
        {"decoder": visual_prefix.decoder_layout},
    ),
}


def family_of(config: ModelConfig) -> Family:
    """Returns the family that a config belongs to."""
    return next(family for family in FAMILIES.values() if type(config) is family.config)


def build(config: ModelConfig, backbone: nn.Module | None = None) -> VisionLanguageModel:
    """Returns a newly initialised model. The caller seeds.

    With a backbone, which is left as it is, the model is given pixels instead of features.
    """
    model: VisionLanguageModel = family_of(config).model(config)
    model.backbone = backbone
    return model


def load_weights(
    model: VisionLanguageModel,
    tensors: Mapping[str, Tensor],
    layout: str = "saved",
    fresh: Sequence[str] = (),
) -> LoadReport:
    """Copies tensors of a named layout into a model, but for its backbone; see layouts.load."""
    return layouts.load(_layout(model, layout), model, tensors, (*fresh, BACKBONE))


def take_over(
    model: VisionLanguageModel,
    tensors: Mapping[str, Tensor],
    layout: str = "saved",
    fresh: Sequence[str] = (),
) -> LoadReport:
    """Copies what fits of them; see layouts.take_over."""
    return layouts.take_over(_layout(model, layout), model, tensors, (*fresh, BACKBONE))


def _layout(model: VisionLanguageModel, name: str) -> Layout:
    """Returns a layout that suits the model, or raises ModelError naming what does not."""
    known = family_of(model.config).layouts
    if name not in known:
        raise ModelError(f"layout {name!r}: {type(model).__name__} reads {', '.join(known)}")
    layout = known[name](model.config)
    for key, value in layout.made_with.items():
        _require(key, getattr(model.config, key), value)
    return layout


# Settings of ours that no tensor's shape tells.
_UNSEEN = (
    "num_heads",
    "region_heads",
    "co_heads",
    "text_connections",
    "region_connections",
    "visual_token_type",
)


def require_same_computation(model: VisionLanguageModel, document: Mapping[str, Any]) -> None:
    """Raises ModelError if weights beside this `config.json` were made with other settings.

    Of those that leave every tensor its shape, so that nothing else would tell. A config of
    transformers without `visual_token_type` says nothing of it: its weights may be of either.
    """
    config = model.config
    layout = layout_of(model, document)
    if layout == "saved":
        theirs = _config_of(family_of(config), document)
        for key in _UNSEEN:
            if hasattr(config, key) and (key != "visual_token_type" or key in document):
                _require(key, getattr(config, key), getattr(theirs, key))
    elif layout == "bert":
        _require("num_heads", config.num_heads, layouts.from_bert_sizes(document)["num_heads"])
    else:
        ours = getattr(config, "decoder", {})
        for key in sorted(key for key in set(ours) & set(document) if "head" in key):
            _require(f"decoder.{key}", ours[key], document[key])


def _require(key: str, ours: Any, theirs: Any) -> None:
    if ours != theirs:
        theirs = list(theirs) if isinstance(theirs, tuple) else theirs
        raise ModelError(
            f"these weights were made with {key}={theirs}, and this model has {ours}: set "
            f"model.sizes.{key}={theirs}"
        )


def layout_of(model: VisionLanguageModel, document: Mapping[str, Any]) -> str:
    """Names the layout in which a folder with this `config.json` holds weights for a model.

    It is that of the family itself, of BERT, or of the language model that a family is built on.
    """
    family, model_type = family_of(model.config), document.get("model_type")
    if "decoder" in family.layouts and model_type != family.model_type:
        return "decoder"
    return "bert" if model_type == "bert" else "saved"


def to_saved(
    config: ModelConfig, parameters: Mapping[str, Tensor], answers: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns `config.json` and the tensors of `model.safetensors`, in the HF layout.

    `parameters` are named as by `model.named_parameters()`, so a sharded engine can gather them
    first; a backbone's are left out. Where transformers has the family, it opens the result
    unchanged.
    """
    family = family_of(config)
    own = {name: one for name, one in parameters.items() if not name.startswith(f"{BACKBONE}.")}
    tensors = layouts.export(family.layouts["saved"](config), own)
    return family.to_document(config, answers), tensors


def from_saved(
    document: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    fresh: Sequence[str] = (),
    backbone: nn.Module | None = None,
) -> tuple[VisionLanguageModel, LoadReport]:
    """Builds the model that a `config.json` describes, ours or transformers', and fills it.

    A backbone comes with its weights. `fresh` is as for layouts.load; name `answer_head` there to
    open a folder whose head is for something that we do not do. Raises ModelError for a family we
    do not have, or weights that do not fit it.
    """
    config = check_document(document)
    for key, value in config.model_dump().items():
        if key.endswith("layers") and value > len(tensors) > 0:
            raise ModelError(f"config.json: {key} is {value}, and there are {len(tensors)} tensors")
    try:
        with torch.device("meta"):  # where sizes beyond all memory cost nothing
            described = build(config)
    except RuntimeError as error:
        raise ModelError(f"config.json: sizes that no tensor can have: {error}") from error
    load_weights(described, tensors, fresh=fresh)
    model = build(config, backbone)
    return model, load_weights(model, tensors, fresh=fresh)


def check_document(document: Mapping[str, Any]) -> ModelConfig:
    """Returns what a `config.json` describes, or raises ModelError naming the key that is wrong."""
    model_type = document.get("model_type")
    family = next((one for one in FAMILIES.values() if one.model_type == model_type), None)
    if family is None:
        known = ", ".join(one.model_type for one in FAMILIES.values())
        raise ModelError(
            f"config.json: model_type is {layouts.shortened(model_type)}; expected one of: {known}"
        )
    return _config_of(family, document)


def _config_of(family: Family, document: Mapping[str, Any]) -> ModelConfig:
    """Returns a family's config, or raises ModelError naming the key that is wrong."""
    try:
        config: ModelConfig = family.from_document(document)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc'])) or 'sizes'}: "
            f"{fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        ]
        raise ModelError(f"config.json: {'; '.join(faults)}") from None
    except KeyError as error:
        raise ModelError(f"config.json: {error} is missing") from None
    return config
