"""The export of a run, a phase or a checkpoint as a model folder that stands alone."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import config, storage
from pipeline.errors import CheckpointError, ConfigError, ModelError
from pipeline.models import families
from pipeline.models.base import ModelConfig
from pipeline.pretrained import files as model_files
from pipeline.pretrained import folder as model_folder
from pipeline.pretrained.card import ModelCard
from pipeline.training.checkpoints import checkpoint
from pipeline.training.checkpoints.checkpoint import CHECKPOINTS
from pipeline.training.continuation import differences, fixed
from pipeline.training.engine.optimizer import EMA_WEIGHTS
from pipeline.training.launch.recorded_spec import read_spec
from pipeline.training.spec import TrainingSpec
from pipeline.training.tracking.metrics_log import read_metrics

MODEL = "model"
PHASES = ("finetune", "pretrain")  # whose state is a run's, the last one first


@dataclass(frozen=True)
class Exported:
    """A model folder, and what it was made from."""

    folder: str
    made_from: str
    step: int
    num_parameters: int
    model_type: str
    skipped: tuple[str, ...] = ()  # damaged checkpoints that an older one replaced, and why

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def export(source: str, folder: str) -> Exported:
    """Writes the model of a run, a phase, a checkpoint or a model folder into an empty `folder`.

    A finished run or phase gives its model, an unfinished one its newest whole checkpoint.
    Raises ConfigError if the folder has something in it, ModelError if there is no model at the
    source, and CheckpointError if a checkpoint is damaged or apart from its run.
    """
    if storage.list_names(folder):
        raise ConfigError(f"{folder}: there is something in it; export into a new folder")
    location, skipped = _newest(source)
    if not _is_checkpoint(location):
        return _copy(location, folder)
    return _from_checkpoint(location, folder, skipped)


def _newest(source: str) -> tuple[str, tuple[str, ...]]:
    """Returns the model folder or the checkpoint that a location means, and why not a newer one."""
    source = storage.absolute(source.rstrip("/"))
    if _is_checkpoint(source) or model_files.is_model(source):
        return source, ()
    for phase in (source, *(storage.join(source, name) for name in PHASES)):
        model = storage.join(phase, MODEL)
        if model_files.is_model(model):
            return model, ()
        damaged: list[str] = []
        with tempfile.TemporaryDirectory(prefix="sightline-") as cache:
            checkpoints = storage.join(phase, CHECKPOINTS)
            found = checkpoint.newest(checkpoints, Path(cache), damaged.append)
        if found is not None:
            return storage.join(checkpoints, checkpoint.name_of(found.step)), tuple(damaged)
    raise ModelError(
        f"{source}: nothing to export; expected a run, a phase of one such as RUN/finetune, "
        "a checkpoint such as RUN/finetune/checkpoints/step-00001000, or a model folder"
    )


def _copy(location: str, folder: str) -> Exported:
    """Copies a model folder, with a page that also tells what its run has found out."""
    document, tensors = model_files.read_weights(location)
    own = model_files.read_own(location)
    model_files.require_unchanged(location, own)
    run = _run_of(location)
    try:
        step = own["step"]
        card = ModelCard(
            model_type=document["model_type"],
            made=own,
            num_parameters=sum(tensor.numel() for tensor in tensors.values()),
            num_answers=len(own["answers"]),
            figures=_losses(storage.join(run, own["phase"]), step),
            metrics=_scores(run, own),
            environment=_json_of(run, "environment.json"),
            recipe=_recipe(run),
        )
        page = card.page()
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"{location}: {model_files.OWN} or {model_files.CONFIG} lacks what a model's page "
            f"tells: {error}"
        ) from error
    names = storage.list_names(location)
    names.remove(model_files.OWN)
    for name in [*names, model_files.OWN]:  # last, for a folder that has it is whole
        payload = storage.read_bytes(storage.join(location, name))
        if name == model_folder.PAGE:
            payload = page.encode()
        storage.write_bytes(storage.join(folder, name), payload)
    return Exported(folder, location, step, card.num_parameters, card.model_type)


def _from_checkpoint(location: str, folder: str, skipped: tuple[str, ...]) -> Exported:
    phase = location.rsplit("/", 2)[0]
    spec = read_spec(phase)
    with tempfile.TemporaryDirectory(prefix="sightline-") as cache:
        manifest = checkpoint.verify(location, Path(cache))
        others = fixed(
            differences(manifest.reproducibility_key, spec.reproducibility_key(), spec.phase)
        )
        if others:
            raise CheckpointError(
                f"{location}: it is not of the run that {phase} describes; it differs in "
                f"{'; '.join(map(str, others))}"
            )
        sizes, parameters = _parameters(spec, location, manifest, Path(cache))
    run = phase.rsplit("/", 1)[0]
    places = (storage.join(above, "tokenizer") for above in (phase, run))  # it may have been moved
    tokenizer = next(filter(storage.exists, places), spec.tokenizer)
    made = {**spec.card, "step": manifest.step}
    card = ModelCard(
        model_type=families.family_of(sizes).model_type,
        made=made,
        num_parameters=sum(parameter.numel() for parameter in parameters.values()),
        num_answers=len(spec.answers),
        figures=_losses(phase, manifest.step),
        environment=_json_of(run, "environment.json"),
        recipe=_recipe(run),
    )
    model_folder.save_model(
        folder,
        config=sizes,
        parameters=parameters,
        tokenizer=tokenizer,
        answers=spec.answers,
        card=card,
        decoding=spec.decoding,
    )
    return Exported(folder, location, manifest.step, card.num_parameters, card.model_type, skipped)


def _parameters(
    spec: TrainingSpec, location: str, manifest: checkpoint.Manifest, cache: Path
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Reads the model's weights out of what training keeps, as it would have written them."""
    sizes: ModelConfig = config.check(families.FAMILIES[spec.family].config, spec.model, "model")
    backbone = None
    if spec.backbone is not None:
        backbone = spec.backbone.model_copy(update={"weights": "random"}).backbone()
    with torch.device("meta"):  # only for its names
        model = families.build(sizes, backbone)
    read = checkpoint.reader(location, manifest, cache)
    parameters = {}
    for name, _ in model.named_parameters():
        stored = f"weight/model.{name}"
        average = f"{EMA_WEIGHTS}/model.{name}"  # which a frozen parameter has none of
        if spec.training.model_weights == "average" and average in manifest.tensors:
            stored = average
        parameters[name] = read(stored)
    return sizes, parameters


def _scores(run: str, own: Mapping[str, Any]) -> dict[str, float]:
    """Returns the run's scores, if they are those of the model with this record."""
    model = storage.join(run, MODEL, model_files.OWN)
    scores = storage.join(run, "evaluation", "metrics.json")
    trained, scored = storage.file_status(model), storage.file_status(scores)
    if trained is None or scored is None or scored.modified < trained.modified:
        return {}
    return _json_of(scores) if _json_of(model) == own else {}


def _losses(phase: str, step: int) -> dict[str, float]:
    """Returns the losses of the last line that was logged up to a step."""
    lines = [line for line in read_metrics(phase) if line["step"] <= step]
    return {"loss": lines[-1]["loss"], **lines[-1]["losses"]} if lines else {}


def _run_of(model: str) -> str:
    """Returns the run of RUN/model or RUN/<phase>/model."""
    above = model.rsplit("/", 1)[0]
    return above if storage.exists(storage.join(above, "recipe.yaml")) else above.rsplit("/", 1)[0]


def _recipe(run: str) -> str:
    location = storage.join(run, "recipe.yaml")
    return storage.read_bytes(location).decode() if storage.exists(location) else ""


def _json_of(*place: str) -> dict[str, Any]:
    location = storage.join(*place)
    if not storage.exists(location):
        return {}
    try:
        document = json.loads(storage.read_bytes(location))
    except ValueError as error:
        raise ModelError(f"{location}: not JSON: {error}; move it away to go without it") from error
    if not isinstance(document, dict):
        raise ModelError(f"{location}: not a JSON object; move it away to go without it")
    return document


def _is_checkpoint(location: str) -> bool:
    return location.rsplit("/", 2)[-2:-1] == [CHECKPOINTS]
