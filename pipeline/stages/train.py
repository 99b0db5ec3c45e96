"""The pretrain and finetune stages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.data.text.vocabulary import load_tokenizer, save_tokenizer
from pipeline.errors import StageError, StoppedError
from pipeline.pretrained.files import OWN, is_model
from pipeline.pretrained.folder import require_same_words
from pipeline.recipe import Recipe
from pipeline.stages.changed import Begun, OnChange, make_way, refuse
from pipeline.stages.data_inputs import DataInputs
from pipeline.stages.phase_spec import check_fits, phase_spec, pretrained_model
from pipeline.stages.preflight import small_validation
from pipeline.stages.progress import StageProgress
from pipeline.stages.publish import publish
from pipeline.stages.state import Outcome, Record, identity, once
from pipeline.training.continuation import Difference
from pipeline.training.launch.launch import launch_all
from pipeline.training.spec import TrainingResult, TrainingSpec
from pipeline.training.tracking.metrics_log import STRETCH
from pipeline.training.tracking.trackers import tracking

REFUSE = OnChange()


def pretrain(recipe: Recipe, progress: StageProgress, on_change: OnChange = REFUSE) -> Outcome:
    """Trains on the recipe's objectives, from `model.initial` or from nothing."""
    if recipe.training.pretrain is None or recipe.objectives is None:
        return Outcome("not in the recipe", 0.0, {})
    inputs = DataInputs.open(recipe)
    inputs.tell(progress)
    model = storage.join(recipe.run, "pretrain", "model")
    return _phases_done(recipe, inputs, ["pretrain"], model, progress, on_change)


def finetune(recipe: Recipe, progress: StageProgress, on_change: OnChange = REFUSE) -> Outcome:
    """Trains the pretrained model on the benchmarks and, where asked for, its blind twin."""
    inputs = DataInputs.open(recipe)
    inputs.tell(progress)
    if recipe.training.pretrain is not None:
        pretrained = pretrained_model(recipe)
        if not is_model(pretrained):
            raise StageError(
                f"{pretrained}: no pretrained model; run `sightline pretrain` with this recipe "
                "first"
            )
    model = storage.join(recipe.run, "model")
    phases = ["finetune", *(["blind"] if recipe.training.blind_twin else [])]
    return _phases_done(recipe, inputs, phases, model, progress, on_change)


def refuse_changes(recipe: Recipe, stage: str, on_change: OnChange) -> None:
    """Raises ConfigError, before any work, for changed settings that a stage will refuse.

    Those that need the data to be told are found when the stage comes.
    """
    phases = {"pretrain": ["pretrain"], "finetune": ["finetune", "blind"]}.get(stage, [])
    for phase in phases:
        training = getattr(recipe.training, "pretrain" if phase == "pretrain" else "finetune")
        begun = Begun.read(storage.join(recipe.run, phase))
        if (
            begun is None
            or training is None
            or (phase == "blind" and not recipe.training.blind_twin)
        ):
            continue
        known = {
            "training": training.reproducibility_key(),
            "seed": recipe.training.seed,
            "family": recipe.model.family,
            "max_tokens": recipe.model.max_tokens,
        }
        refuse(begun, begun.changes(known), on_change, recipe.run)


def _phases_done(
    recipe: Recipe,
    inputs: DataInputs,
    phases: Sequence[str],
    model: str,
    progress: StageProgress,
    on_change: OnChange,
) -> Outcome:
    """Trains what is not trained yet of a stage's phases; `model` is what the stage leaves.

    A phase goes on where it was interrupted. What is done about one that was begun with other
    settings is for the command to say (see `pipeline.stages.changed`).
    """
    stage = phases[0]
    leaves = [model]
    if "blind" in phases:
        leaves.append(storage.join(recipe.run, "blind", "model"))
    is_whole = all(map(is_model, leaves))
    plans = [_Plan.of(recipe, inputs, phase) for phase in phases]
    before = Record.read(recipe.run, stage)
    if before and before.state == "done" and before.identity == _identity(plans) and is_whole:
        return Outcome("up to date", before.seconds, before.outputs)
    for plan in plans:
        if plan.begun:
            refuse(plan.begun, plan.changed, on_change, recipe.run, inputs.extractor)
    if is_whole and all(plan.is_finished for plan in plans):
        outputs = _outputs([plan.begun.finished for plan in plans if plan.begun], phases)
        if stage == "finetune":
            outputs["model"] = model
        seconds = before.seconds if before else 0.0
        Record(_identity(plans), "done", seconds, outputs).write(recipe.run, stage)
        return Outcome("up to date", seconds, outputs)
    for number, plan in enumerate(plans):
        if plan.begun and make_way(plan.begun, plan.changed, on_change.decision, progress.note):
            plans[number] = _Plan.of(recipe, inputs, plan.phase)
    for plan in plans:
        if plan.inputs.dataset.version < inputs.dataset.version:
            progress.note(
                f"{plan.phase}: goes on with version {plan.inputs.dataset.version} of the dataset, "
                f"as it began; the newest is {inputs.dataset.version}"
            )
    specs = [plan.with_tokenizer() for plan in plans]

    def work() -> dict[str, Any]:
        outputs = _train(recipe, plans, specs, progress)
        if stage == "finetune":
            publish(recipe, model, progress)
            outputs["model"] = model
        return outputs

    parts = {plan.phase: _lasting(plan.spec) for plan in plans}
    return once(recipe.run, stage, parts, work, [storage.join(leaf, OWN) for leaf in leaves])


@dataclass(frozen=True)
class _Plan:
    """A phase as it is to be trained now, beside what is there of it."""

    phase: str
    spec: TrainingSpec
    inputs: DataInputs  # in the versions that it trains on
    begun: Begun | None

    @classmethod
    def of(cls, recipe: Recipe, inputs: DataInputs, phase: str) -> "_Plan":
        begun = Begun.read(storage.join(recipe.run, phase))
        kept = inputs if begun is None else inputs.at_versions_of(begun)
        spec = phase_spec(recipe, kept, phase, begun)
        return cls(phase, spec, kept, begun)

    @property
    def changed(self) -> Sequence[Difference]:
        return self.begun.changes(self.spec.reproducibility_key()) if self.begun else ()

    @property
    def is_finished(self) -> bool:
        return self.begun is not None and self.begun.finished is not None and not self.changed

    def with_tokenizer(self) -> TrainingSpec:
        """Leaves the tokenizer in the phase's folder, where no later one replaces it."""
        folder = storage.join(self.spec.folder, "tokenizer")
        if self.spec.tokenizer != folder:
            save_tokenizer(load_tokenizer(self.spec.tokenizer), folder)
        return self.spec.model_copy(update={"tokenizer": folder})


def _identity(plans: Sequence[_Plan]) -> str:
    return identity({plan.phase: _lasting(plan.spec) for plan in plans})


def _lasting(spec: TrainingSpec) -> dict[str, Any]:
    """Returns what a finished phase depends on: of its data the content, not the version."""
    reproducibility_key = spec.reproducibility_key()
    del reproducibility_key["dataset_version"]
    for other in reproducibility_key["mixed_in"]:
        del other["dataset_version"]
    return reproducibility_key


def _train(
    recipe: Recipe,
    plans: Sequence[_Plan],
    specs: Sequence[TrainingSpec],
    progress: StageProgress,
) -> dict[str, Any]:
    """Runs phases one after another; raises StoppedError if the run was told to stop."""
    for plan in plans:
        check_fits(plan.spec, plan.inputs, recipe.cluster.workers)
    for spec in specs:
        if spec.initial is not None:
            require_same_words(spec.tokenizer, spec.initial)
    warning = small_validation(recipe, plans[0].inputs.dataset)
    if warning is not None:
        progress.note(f"warning: {warning}")

    def show(line: dict[str, Any]) -> None:
        if "loss" not in line:
            progress.note(f"{line['phase']}: {_said(line)}")
            return
        losses = "  ".join(f"{name} {loss:.3f}" for name, loss in line["losses"].items())
        figures = f"loss {line['loss']:.3f} ({losses})  {line['samples_per_second']:.0f} samples/s"
        if "evaluation" in line:
            found = "  ".join(f"{name} {value:.3f}" for name, value in line["evaluation"].items())
            progress.note(f"{line['phase']}: held-out at step {line['step']}: {found}")
        total = next(spec.training.steps for spec in specs if spec.phase == line["phase"])
        progress.update(line["step"], total, figures, phase=line["phase"])

    with tracking(recipe.trackers, recipe.run, recipe.name, recipe.model_dump(mode="json")) as tell:

        def follow(line: dict[str, Any]) -> None:
            show(line)
            tell(line)

        results = launch_all(specs, recipe.cluster, follow)
    stopped = [result for result in results if result.state == "stopped"]
    if stopped or len(results) < len(specs):
        raise StoppedError(
            f"training was told to stop and left a checkpoint at step {stopped[0].step} of "
            f"{stopped[0].steps}; the same command goes on from there"
        )
    return _outputs(results, [spec.phase for spec in specs])


def _outputs(results: Sequence[TrainingResult | None], phases: Sequence[str]) -> dict[str, Any]:
    return {
        phase: {"steps": result.steps, "loss": result.loss, "model": result.model_folder}
        for phase, result in zip(phases, results, strict=True)
        if result is not None
    }


def _said(event: Mapping[str, Any]) -> str:
    """Returns what happened in training, and why, if the event says so."""
    step = f" at step {event['step']}" if "step" in event else ""
    if event["event"] == STRETCH:
        changes = (f"{key} {old} → {new}" for key, (old, new) in event["changed"].items())
        return f"a new stretch begins{step}: {', '.join(changes)}"
    reason = event.get("reason") or event.get("summary")
    reason = f": {reason}" if reason else ""
    return f"{event['event']}{step}{reason}"
