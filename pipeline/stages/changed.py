"""What is there of a phase that was begun before, and what is done where its settings changed.

Nothing that training made is removed. A phase whose settings are what they were goes on. Where
some are not, it is refused, with the commands that lead on: to go on from the newest checkpoint as
a new stretch of the same line (`--from-checkpoint`), to start another run from its weights, or to
start anew with the old folder moved aside (`--restart`).
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline import storage
from pipeline.data.read.extractor_card import ExtractorCard
from pipeline.errors import CheckpointError, ConfigError, TrainingError
from pipeline.pretrained.files import extractor_of, is_model
from pipeline.training.assembly import MODEL
from pipeline.training.checkpoints import checkpoint
from pipeline.training.checkpoints.checkpoint import CHECKPOINTS
from pipeline.training.continuation import Difference, differences, fixed
from pipeline.training.launch.recorded_spec import SPEC, read_spec
from pipeline.training.lease import only_writer
from pipeline.training.result import finished_result
from pipeline.training.spec import TrainingResult, TrainingSpec, training_key

Note = Callable[[str], None]

# With a change of only these, a finished run has something to do without any further step.
_CHOOSE_WEIGHTS = {
    "evaluation.restore_best",
    "evaluation.best_by",
    "evaluation.best_is",
    "model_weights",
}
_EXTRACTOR = "features.extractor"
# Weights of a run that differs in one of these fit no other.
_SHAPES = ("model.family", "model.sizes", _EXTRACTOR)
# But in these: a head is made anew, and the others are of no shape.
_FITTING = {f"model.sizes.{name}" for name in ("num_answers", "dropout", "initializer_range")}


@dataclass(frozen=True)
class OnChange:
    """What a command wants of a phase that was begun with other settings.

    `command` is what the user gave, without that: what a refusal repeats.
    """

    decision: Literal["refuse", "continue", "restart"] = "refuse"
    command: str = "sightline run RECIPE"


@dataclass(frozen=True)
class Begun:
    """What is there of a phase. `steps` are those of its checkpoints, whole or not."""

    folder: str
    spec: TrainingSpec
    steps: tuple[int, ...]
    finished: TrainingResult | None

    @classmethod
    def read(cls, folder: str) -> "Begun | None":
        """Returns None if the phase was never begun; TrainingError if that cannot be told."""
        if not storage.exists(storage.join(folder, SPEC)):
            return None
        try:
            spec = read_spec(folder)
        except TrainingError as error:
            raise TrainingError(
                f"{error}. Put an undamaged copy of that file back, or move {folder} away, and "
                "start again: the phase is then trained from the first step"
            ) from error
        spec = spec.model_copy(update={"folder": storage.absolute(folder)})
        steps = checkpoint.steps_in(storage.join(folder, CHECKPOINTS))
        return cls(folder, spec, tuple(steps), finished_result(spec))

    @property
    def model(self) -> str:
        return storage.join(self.folder, MODEL)

    @property
    def has_model(self) -> bool:
        return is_model(self.model)

    def changes(self, reproducibility_key: dict[str, Any]) -> tuple[Difference, ...]:
        """Compares with settings of now: with all of them, or with those that are known yet."""
        return differences(self.spec.reproducibility_key(), reproducibility_key, self.spec.phase)

    def is_beyond_repair(self) -> bool:
        """Whether it has checkpoints, and none that can be gone on from."""
        if self.finished or not self.steps:
            return False
        with tempfile.TemporaryDirectory(prefix="sightline-") as cache:
            folder = storage.join(self.folder, CHECKPOINTS)
            try:
                return checkpoint.newest(folder, Path(cache), lambda _: None) is None
            except CheckpointError:
                return True


def refuse(
    begun: Begun,
    changed: Sequence[Difference],
    on_change: OnChange,
    run: str,
    extractor: ExtractorCard | None = None,
) -> None:
    """Raises ConfigError, saying what leads on, unless the command says what is wanted.

    Goes through silently where there is nothing yet that could be lost. `extractor` is the card of
    now: features can differ though the recipe does not, if another release makes them.
    """
    if not changed or on_change.decision == "restart" or not (begun.steps or begun.has_model):
        return
    if on_change.decision == "continue" and not _why_not_on(begun, changed):
        return
    phase, reached = begun.spec.phase, begun.steps[-1] if begun.steps else 0
    if begun.finished:
        state = f"is finished, with {begun.finished.step} steps"
    else:
        state = f"has checkpoints up to step {reached} of {begun.spec.training.steps}"
    lines = [f"{phase} in {run} {state}, and was begun with other settings:"]
    lines += [f"  {one}" for one in changed]
    why = _why_not_on(begun, changed)
    if why is None:
        lines += [
            f"To go on from step {reached} with the new settings:",
            f"  {on_change.command} --from-checkpoint",
        ]
    else:
        lines.append(why)
    is_of_release = extractor is not None and _is_of_release(begun, changed, extractor)
    if is_of_release:
        lines.append(
            "The recipe's extractor is the same: this release makes other features of a picture "
            "than the one that began the run. That one goes on with it; RUN/environment.json "
            "names it."
        )
    moved = aside(begun.folder).rsplit("/", 1)[-1]
    lines += [
        f"To train {phase} anew (what is there is moved to {moved}, nothing is deleted):",
        f"  {on_change.command} --restart",
    ]
    if why is not None:
        others = [one for one in changed if not (is_of_release and one.key == _EXTRACTOR)]
        lines += _from_weights(begun, others, on_change.command, run)
    if not begun.finished and not is_of_release:
        lines.append("With the old settings it goes on as it was.")
    raise ConfigError("\n".join(lines))


def _why_not_on(begun: Begun, changed: Sequence[Difference]) -> str | None:
    """Says why a phase cannot go on from its checkpoint; None if it can."""
    others = fixed(changed)
    if others:
        keys = ", ".join(dict.fromkeys(one.key for one in others))
        return f"A run cannot go on with another value of {keys}."
    if not begun.steps:
        return "It has no checkpoint that it could go on from."
    training = training_key(begun.spec.phase)
    steps = {one.key: one.now for one in changed}.get(f"{training}.steps")
    if steps is not None and steps < begun.steps[-1]:
        return f"Its newest checkpoint, at step {begun.steps[-1]}, is past the new steps={steps}."
    names = {one.key.removeprefix(f"{training}.") for one in changed}
    planned = steps or begun.spec.training.steps
    is_over = begun.finished is not None and begun.finished.step >= planned
    if is_over and not names & _CHOOSE_WEIGHTS:
        return (
            "It has made all of its steps, so that the new settings would have none to act on; "
            f"with a larger {training}.steps and --from-checkpoint it goes on."
        )
    return None


def _is_of_release(begun: Begun, changed: Sequence[Difference], extractor: ExtractorCard) -> bool:
    """Whether features differ by nothing that anybody has set."""
    then = extractor_of(begun.spec.card)
    return (
        any(one.key == _EXTRACTOR for one in changed)
        and then is not None
        and (
            (then.type, then.config, then.weights, then.dim)
            == (extractor.type, extractor.config, extractor.weights, extractor.dim)
        )
    )


def _from_weights(begun: Begun, changed: Sequence[Difference], command: str, run: str) -> list[str]:
    """Says how another run starts from what this one has learned, where that is possible."""
    phase = begun.spec.phase
    shapes = [one for one in changed if one.key.startswith(_SHAPES) and one.key not in _FITTING]
    if phase == "blind" or shapes:
        return []
    weights, new_run = begun.model, f"{run.rstrip('/')}-2"
    lines = ["To start another run from its weights:"]
    if not begun.has_model:
        weights = f"{run.rstrip('/')}-{phase}-model"
        lines.append(f"  sightline export {begun.folder} {weights}")
    alone = " training.pretrain=null objectives=null" if phase == "finetune" else ""
    start = f"model.initial={weights} model.tokenizer={weights}"
    lines.append(f"  {command} run={new_run} {start}{alone}")
    return lines


def make_way(begun: Begun, changed: Sequence[Difference], decision: str, note: Note) -> bool:
    """Moves aside what must not be overwritten, and returns whether the phase starts anew.

    What `refuse` would refuse must not come here.
    """
    with only_writer(begun.folder, note):  # ranks of a killed command may be at it still
        is_lost = not (begun.steps or begun.has_model)
        if changed and (is_lost or decision == "restart"):
            pass
        elif decision == "restart" and begun.is_beyond_repair():
            note(f"{begun.spec.phase}: no checkpoint is whole")
        else:
            if changed and begun.finished and begun.has_model:
                kept = _unused(f"{begun.model}.{checkpoint.name_of(begun.finished.step)}")
                _move(begun.model, kept)
                note(f"{begun.spec.phase}: the model of step {begun.finished.step} is in {kept}")
            return False
        target = aside(begun.folder)
        _move(begun.folder, target)
        note(f"{begun.spec.phase}: starts anew; what was there is in {target}")
        return True


def _move(folder: str, target: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # each of torchrun's processes would do it
        raise ConfigError(
            f"{folder} must make way for what is trained next, and of the processes that torchrun "
            f"started none is to do that; move it to {target} yourself, and start again"
        )
    storage.move(folder, target)


def aside(folder: str) -> str:
    """Returns the name that a folder is moved to when another takes its place."""
    number = 1
    while storage.exists(f"{folder}.replaced-{number}"):
        number += 1
    return f"{folder}.replaced-{number}"


def _unused(folder: str) -> str:
    return aside(folder) if storage.exists(folder) else folder
