"""The pretrain and finetune stages: a dataset with features to a model folder."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.data.dataset import Dataset, Split
from pipeline.data.images import LiveConfig
from pipeline.data.picture_range import PictureRange
from pipeline.data.vocabulary import build_tokenizer, load_tokenizer, save_tokenizer
from pipeline.errors import ConfigError, PipelineError, StageError, StoppedError, TrainingError
from pipeline.model_files import digest, is_model, read_own
from pipeline.objectives.objective import ObjectivesConfig
from pipeline.recipe import MixedInPart, Recipe
from pipeline.stages.preflight import require_splits, small_validation
from pipeline.stages.progress import StageProgress
from pipeline.stages.state import Outcome, once
from pipeline.training.launch import launch_all, read_spec
from pipeline.training.model_folder import require_same_words
from pipeline.training.spec import MixedIn, TrainingConfig, TrainingSpec
from pipeline.training.trackers import tracking
from pipeline.vision.feature import extractor_name
from pipeline.vision.live import backbone_config, live_config

# Raised when the same inputs would give another model.
PRETRAIN_VERSION = 1
FINETUNE_VERSION = 1


@dataclass(frozen=True)
class DataInputs:
    """What training reads, opened: the newest version of the dataset with its features.

    Features are stored under the extractor's name, or `live`: made of the pictures for each batch.
    """

    dataset: Dataset
    extractor: dict[str, Any]  # its card
    mixed_in: tuple[tuple[Dataset, MixedInPart], ...] = ()

    @classmethod
    def open(cls, recipe: Recipe) -> "DataInputs":
        """Raises ManifestError or FeatureError if an earlier stage has work to do.

        ConfigError names a split or texts that the dataset does not have.
        """
        dataset = Dataset.open(recipe.dataset.path)
        require_splits(recipe, dataset)
        card = recipe.features.card()
        others = ((Dataset.open(other.path), other) for other in recipe.dataset.mixed_in)
        inputs = cls(dataset, card, tuple(others))
        for other, part in inputs.mixed_in:
            other.split(part.split, inputs.live or inputs.features)
        for split in (recipe.dataset.train_split, recipe.dataset.validation_split):
            inputs.split(split)
        return inputs

    @property
    def features(self) -> str | None:
        """The extractor's folder under `features/`; None if nothing is stored there."""
        return None if self.live else self.name

    @property
    def live(self) -> LiveConfig | None:
        """How pictures become features as they are read, if they do."""
        return live_config(self.extractor)

    @property
    def name(self) -> str:
        """What made the features, in a word."""
        return extractor_name(self.extractor["type"], self.extractor["identity"])

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns, if the regions are a grid's cells."""
        grid = self.extractor["grid"]
        return (grid[0], grid[1]) if grid else None

    def split(self, name: str) -> Split:
        """Opens a split whose pictures are seen as they are, without augmentation."""
        return self.dataset.split(name, self.live.whole() if self.live else self.features)

    def identity(self, *splits: str) -> dict[str, Any]:
        """Says what there is to learn from in these splits, wherever and in which version."""
        return {
            "dataset": self.dataset.url,
            "content": {split: self.dataset.content(split) for split in splits},
            "features": self.name,
            "mixed_in": [
                {"dataset": other.url, "content": other.content(part.split), "weight": part.weight}
                for other, part in self.mixed_in
            ],
        }


def pretrain(recipe: Recipe, progress: StageProgress) -> Outcome:
    """Trains on the recipe's objectives, from `model.initial` or from nothing."""
    training, objectives = recipe.training.pretrain, recipe.objectives
    if training is None or objectives is None:
        return Outcome("not in the recipe", 0.0, {})
    inputs = DataInputs.open(recipe)
    answers = known_answers(recipe, inputs) if "qa" in objectives.settings() else ()
    parts = {
        "code": PRETRAIN_VERSION,
        "inputs": inputs.identity(*_splits(recipe, training)),
        "answers": list(answers),
        "teachers": _teachers(objectives.locations()),
        "model": recipe.model.model_dump(mode="json"),
        "objectives": objectives.model_dump(mode="json"),
        "training": training.sequence() | {"precision": training.precision},
        "seed": recipe.training.seed,
    }

    def work() -> dict[str, Any]:
        prepare_tokenizer(recipe, inputs)
        spec = phase_spec(
            recipe, inputs, "pretrain", training, objectives, recipe.model.initial, answers
        )
        return _train(recipe, inputs, [spec], progress)

    return once(
        recipe.run,
        "pretrain",
        parts,
        work,
        clear=lambda: _clear(recipe, ["pretrain"]),
        leaves=[storage.join(recipe.run, "pretrain", "model", "sightline.json")],
    )


def finetune(recipe: Recipe, progress: StageProgress) -> Outcome:
    """Trains the pretrained model on the benchmarks and, where asked for, its blind twin."""
    inputs = DataInputs.open(recipe)
    initial = _pretrained(recipe)
    training = recipe.training.finetune
    parts = {
        "code": FINETUNE_VERSION,
        "inputs": inputs.identity(*_splits(recipe, training)),
        "model": recipe.model.model_dump(mode="json"),
        "initial": _content(initial) if initial else None,
        "benchmarks": recipe.benchmarks.model_dump(mode="json"),
        "teachers": list(_teachers(recipe.benchmarks.objectives().locations()).values()),
        "training": training.sequence() | {"precision": training.precision},
        "blind_twin": recipe.training.blind_twin,
        "seed": recipe.training.seed,
    }
    phases = ["finetune", *(["blind"] if recipe.training.blind_twin else [])]

    def work() -> dict[str, Any]:
        prepare_tokenizer(recipe, inputs)
        answers = known_answers(recipe, inputs)
        objectives = recipe.benchmarks.objectives()
        specs = [
            phase_spec(recipe, inputs, phase, training, objectives, initial, answers)
            for phase in phases
        ]
        outputs = _train(recipe, inputs, specs, progress)
        model = storage.join(recipe.run, "model")
        storage.remove(model)
        for name in storage.list_names(storage.join(recipe.run, "finetune", "model")):
            payload = storage.read_bytes(storage.join(recipe.run, "finetune", "model", name))
            storage.write_bytes(storage.join(model, name), payload)
        return outputs | {"model": model}

    return once(
        recipe.run,
        "finetune",
        parts,
        work,
        clear=lambda: _clear(recipe, ["finetune", "blind", "model"]),
        leaves=[storage.join(recipe.run, "model", "sightline.json")],
    )


def _train(
    recipe: Recipe, inputs: DataInputs, specs: Sequence[TrainingSpec], progress: StageProgress
) -> dict[str, Any]:
    """Runs phases one after another; raises StoppedError if the run was told to stop."""
    for spec in specs:
        check_fits(spec, inputs, recipe.cluster.workers)
        if spec.initial is not None:
            require_same_words(spec.tokenizer, spec.initial)
    warning = small_validation(recipe, inputs.dataset)
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
    return {
        spec.phase: {"steps": result.steps, "loss": result.loss, "model": result.model_folder}
        for spec, result in zip(specs, results, strict=True)
    }


def _said(event: Mapping[str, Any]) -> str:
    """Returns what happened in training, and why, if the event says so."""
    step = f" at step {event['step']}" if "step" in event else ""
    reason = event.get("reason") or event.get("summary")
    reason = f": {reason}" if reason else ""
    return f"{event['event']}{step}{reason}"


def phase_specs(recipe: Recipe, inputs: DataInputs) -> list[TrainingSpec]:
    """Returns the phases that training will have; none starts from what another has yet to make."""
    prepare_tokenizer(recipe, inputs)
    answers = known_answers(recipe, inputs)
    initial = recipe.model.initial
    specs = []
    if recipe.training.pretrain is not None and recipe.objectives is not None:
        asked = answers if "qa" in recipe.objectives.settings() else ()
        pretrain = ("pretrain", recipe.training.pretrain, recipe.objectives, initial, asked)
        specs.append(phase_spec(recipe, inputs, *pretrain))
    objectives = recipe.benchmarks.objectives()
    for phase in ("finetune", *(["blind"] if recipe.training.blind_twin else [])):
        finetune = (phase, recipe.training.finetune, objectives, initial, answers)
        specs.append(phase_spec(recipe, inputs, *finetune))
    return specs


def phase_spec(
    recipe: Recipe,
    inputs: DataInputs,
    phase: str,
    training: TrainingConfig,
    objectives: ObjectivesConfig,
    initial: str | None,
    answers: Sequence[str],
) -> TrainingSpec:
    folder = storage.absolute(storage.join(recipe.run, phase))
    version, mixed_in = _versions(folder, inputs)
    caption, vqa = recipe.benchmarks.caption, recipe.benchmarks.vqa
    pictures = None
    if phase != "blind":
        pictures = PictureRange.of(inputs.split(recipe.dataset.train_split)).to_json()
    tokenizer = storage.absolute(storage.join(recipe.run, "tokenizer"))
    config = recipe.model.config(
        vocab_size=len(load_tokenizer(tokenizer)),
        feature_dim=inputs.extractor["dim"],
        num_answers=len(answers),
    )
    return TrainingSpec(
        phase=phase,
        folder=folder,
        dataset=inputs.dataset.url,
        dataset_version=version,
        split=recipe.dataset.train_split,
        mixed_in=mixed_in,
        held_out_split=recipe.dataset.validation_split,
        features=inputs.features,
        live=inputs.live,
        backbone=backbone_config(inputs.extractor),
        family=recipe.model.family,
        model=config.model_dump(mode="json"),
        initial=storage.absolute(initial) if initial else None,
        tokenizer=tokenizer,
        max_tokens=recipe.model.max_tokens,
        decoding=caption.decoding() if caption else None,
        answers=tuple(answers),
        objectives=objectives.settings(),
        blind=phase == "blind",
        seed=recipe.training.seed,
        training=training,
        card={
            "recipe": recipe.name,
            "family": recipe.model.family,
            "phase": phase,
            "max_tokens": recipe.model.max_tokens,
            **({"question_tokens": vqa.max_tokens} if vqa else {}),
            **({"pictures": pictures} if pictures else {}),
            "data": {
                "dataset": inputs.dataset.url,
                "version": version,
                "split": recipe.dataset.train_split,
                "features": inputs.name,
            },
            "extractor": inputs.extractor,
            "objectives": objectives.settings(),
            "training": training.model_dump(mode="json"),
            "seed": recipe.training.seed,
        },
    )


def _splits(recipe: Recipe, training: TrainingConfig) -> Sequence[str]:
    """Returns what training reads: held-out samples too, where they decide when it ends."""
    evaluates = training.evaluate_every_steps is not None
    held_out = [recipe.dataset.validation_split] if evaluates else []
    return (recipe.dataset.train_split, *held_out)


def _versions(folder: str, inputs: DataInputs) -> tuple[int, tuple[MixedIn, ...]]:
    """Returns the manifest version to train on, and the datasets beside the own one in theirs.

    Those of an unfinished run are what it began with: a later version may hold the same samples in
    another order.
    """
    with contextlib.suppress(TrainingError):
        begun = read_spec(folder)
        return begun.dataset_version, begun.mixed_in
    return inputs.dataset.version, tuple(
        MixedIn(
            dataset=other.url,
            dataset_version=other.version,
            split=part.split,
            weight=part.weight,
        )
        for other, part in inputs.mixed_in
    )


def check_fits(spec: TrainingSpec, inputs: DataInputs, workers: int) -> None:
    """Refuses what the data cannot feed, before a worker starts."""
    splits = [spec.split]
    if spec.training.evaluate_every_steps is not None and spec.held_out_split is not None:
        splits.append(spec.held_out_split)
    for split in map(inputs.split, splits):
        for objective in ObjectivesConfig.model_validate(spec.objectives).build():
            kind = objective.stream.kind
            num_examples = int(split.counts(kind).sum())
            if num_examples < workers:
                raise ConfigError(
                    f"cluster.workers: found {workers}, but split {split.name!r} has "
                    f"{num_examples} {kind} for objective {objective.name!r} and each rank needs "
                    "one; use fewer workers, or a dataset that has them"
                )


def known_answers(recipe: Recipe, inputs: DataInputs) -> Sequence[str]:
    """Returns the answers that the recipe's VQA benchmark lets a model give."""
    if recipe.benchmarks.vqa is None:
        return ()
    return recipe.benchmarks.vqa.build().answers(inputs.split(recipe.dataset.train_split))


def prepare_tokenizer(recipe: Recipe, inputs: DataInputs) -> None:
    """Leaves in RUN/tokenizer the recipe's tokenizer, or one built from the training texts."""
    folder = storage.join(recipe.run, "tokenizer")
    given = recipe.model.tokenizer
    parts = {
        "dataset": inputs.identity(recipe.dataset.train_split) if given is None else None,
        "given": given,
        "vocab_size": recipe.model.vocab_size,
    }

    def work() -> dict[str, Any]:
        if given is not None:
            tokenizer = load_tokenizer(given)
        else:
            split = inputs.split(recipe.dataset.train_split)
            texts = split.texts(range(split.num_samples))
            captions = (caption for text in texts for caption in text.captions)
            questions = (question.question for text in texts for question in text.questions)
            tokenizer = build_tokenizer([*captions, *questions], recipe.model.vocab_size)
        save_tokenizer(tokenizer, folder)
        return {"tokens": len(tokenizer)}

    once(
        recipe.run,
        "tokenizer",
        parts,
        work,
        clear=lambda: storage.remove(folder),
        leaves=[storage.join(folder, "tokenizer_config.json")],
    )


def _pretrained(recipe: Recipe) -> str | None:
    """Returns the model folder that fine-tuning starts from."""
    if recipe.training.pretrain is None:
        return recipe.model.initial
    folder = storage.join(recipe.run, "pretrain", "model")
    if not is_model(folder):
        raise StageError(
            f"{folder}: no pretrained model; run `sightline pretrain` with this recipe first"
        )
    return folder


def _teachers(locations: Mapping[str, str]) -> dict[str, str]:
    """Returns what is in each model that is learned from; ConfigError for one with a backbone."""
    for key, place in locations.items():
        if backbone_config(read_own(place).get("extractor") or {}):
            raise ConfigError(
                f"{key}: {place} sees with a backbone of its own, and a teacher is given features; "
                "choose one that was trained on stored features or on pixels"
            )
    return {key: _content(place) for key, place in locations.items()}


def _content(location: str) -> str:
    """Returns a digest of a model's weights."""
    try:
        return digest(location)
    except PipelineError as error:
        raise ConfigError(f"model.initial: {error}") from error


def _clear(recipe: Recipe, names: Sequence[str]) -> None:
    for name in names:
        storage.remove(storage.join(recipe.run, name))
