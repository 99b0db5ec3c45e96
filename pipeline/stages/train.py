"""The pretrain and finetune stages."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline import storage
from pipeline.benchmarks.base import texts_of
from pipeline.data.read.dataset import Dataset, Split
from pipeline.data.read.extractor_card import ExtractorCard
from pipeline.data.read.images import LiveConfig
from pipeline.data.text.picture_range import PictureRange
from pipeline.data.text.vocabulary import build_tokenizer, load_tokenizer, save_tokenizer
from pipeline.errors import ConfigError, PipelineError, StageError, StoppedError
from pipeline.objectives.objective import ObjectivesConfig
from pipeline.pretrained.files import OWN, digest, extractor_of, is_model, read_own
from pipeline.pretrained.folder import require_same_words
from pipeline.recipe import MixedInPart, Recipe
from pipeline.stages.changed import Begun, OnChange, aside, make_way, refuse
from pipeline.stages.preflight import require_splits, small_validation
from pipeline.stages.progress import StageProgress
from pipeline.stages.state import Outcome, Record, identity, once
from pipeline.training.config import TrainingConfig
from pipeline.training.continuation import Difference
from pipeline.training.launch.launch import launch_all
from pipeline.training.spec import MixedIn, TrainingResult, TrainingSpec
from pipeline.training.tracking.metrics_log import STRETCH
from pipeline.training.tracking.trackers import tracking
from pipeline.vision.extractors.live import backbone_config, live_config

REFUSE = OnChange()
DATA = "dataset"  # the part of the recipe that says what there is to learn from


@dataclass(frozen=True)
class DataInputs:
    """What training reads, opened: the newest version of the dataset with its features.

    Features are stored under the extractor's name, or `live`: made of the pictures for each batch.
    """

    dataset: Dataset
    extractor: ExtractorCard
    mixed_in: tuple[tuple[Dataset, MixedInPart], ...] = ()
    passed_over: dict[str, int] = field(default_factory=dict)  # by split: samples without features

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
            inputs.passed_over[split] = inputs.split(split).num_rejects
        return inputs

    def tell(self, progress: StageProgress) -> None:
        """Says how many samples are passed over, as their images have no features."""
        for split, number in self.passed_over.items():
            if number:
                progress.note(
                    f"split {split}: {number:,} samples without features of {self.name} are passed "
                    f"over; `sightline data rejects {self.dataset.url}` lists them"
                )

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
        return self.extractor.name

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns, if the regions are a grid's cells."""
        return self.extractor.grid

    def split(self, name: str) -> Split:
        """Opens a split whose pictures are seen as they are, without augmentation."""
        return self.dataset.split(name, self.live.whole() if self.live else self.features)

    def at_versions_of(self, begun: Begun) -> "DataInputs":
        """Returns the same data as an unfinished phase began with it.

        A later version may hold other samples, or the same in another order.
        """
        spec = begun.spec
        if begun.finished or spec.dataset != storage.absolute(self.dataset.url):
            return self
        others = self.mixed_in
        if _as_begun(begun, self.mixed_in_versions()) == spec.mixed_in:
            versions = [one.dataset_version for one in spec.mixed_in]
            others = tuple(
                (Dataset.open(other.url, version), part)
                for (other, part), version in zip(self.mixed_in, versions, strict=True)
            )
        dataset = Dataset.open(self.dataset.url, spec.dataset_version)
        return replace(self, dataset=dataset, mixed_in=others)

    def mixed_in_versions(self) -> tuple[MixedIn, ...]:
        return tuple(
            MixedIn(
                dataset=other.url,
                dataset_version=other.version,
                split=part.split,
                weight=part.weight,
            )
            for other, part in self.mixed_in
        )

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
        pretrained = _pretrained(recipe)
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
            _publish(recipe, model, progress)
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


def _publish(recipe: Recipe, model: str, progress: StageProgress) -> None:
    """Leaves in RUN/model the fine-tuned model; what is there is moved aside if it has no copy."""
    trained = storage.join(recipe.run, "finetune", "model")
    if is_model(model):
        folders = [name for name in storage.list_names(recipe.run) if name.startswith("finetune")]
        copies = (
            storage.join(recipe.run, folder, name)
            for folder in folders
            for name in storage.list_names(storage.join(recipe.run, folder))
            if name.startswith("model")
        )
        record = storage.read_bytes(storage.join(model, OWN))
        if not any(is_model(copy) and _record_of(copy) == record for copy in copies):
            kept = aside(model)
            storage.move(model, kept)
            progress.note(f"finetune: the model that was in {model} is in {kept}")
    storage.remove(model)
    names = storage.list_names(trained)
    names.remove(OWN)
    for name in [*names, OWN]:  # last, for a folder that has it is whole
        payload = storage.read_bytes(storage.join(trained, name))
        storage.write_bytes(storage.join(model, name), payload)


def _record_of(model: str) -> bytes:
    return storage.read_bytes(storage.join(model, OWN))


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


def phase_specs(recipe: Recipe, inputs: DataInputs) -> list[TrainingSpec]:
    """Returns the phases that training will have, as if nothing were trained yet.

    None starts from what another has yet to make.
    """
    phases = ["finetune", *(["blind"] if recipe.training.blind_twin else [])]
    if recipe.training.pretrain is not None:
        phases.insert(0, "pretrain")
    return [phase_spec(recipe, inputs, phase, alone=True) for phase in phases]


def phase_spec(
    recipe: Recipe,
    inputs: DataInputs,
    phase: str,
    begun: Begun | None = None,
    alone: bool = False,
) -> TrainingSpec:
    """Returns a phase as the recipe wants it; one that was begun keeps versions and tokenizer.

    `alone` leaves out what an earlier phase makes.
    """
    is_first = phase == "pretrain" or recipe.training.pretrain is None or alone
    initial = recipe.model.initial if is_first else _pretrained(recipe)
    if phase == "pretrain":
        assert recipe.training.pretrain is not None
        assert recipe.objectives is not None
        training, objectives = recipe.training.pretrain, recipe.objectives
    else:
        training, objectives = recipe.training.finetune, recipe.benchmarks.objectives()
    asks = phase != "pretrain" or "qa" in objectives.settings()
    answers = known_answers(recipe, inputs) if asks else ()
    folder = storage.absolute(storage.join(recipe.run, phase))
    contents = _contents(recipe, inputs, training)
    if is_first:
        contents |= _contents_of_start(recipe)
    else:
        contents["training.pretrain: its model"] = _content(_pretrained(recipe))
    teachers = objectives.locations()
    part = "objectives" if phase == "pretrain" else "benchmarks"
    contents |= {f"{part}.{key}": digest for key, digest in _teachers(teachers).items()}
    tokenizer = _tokenizer(recipe, inputs, folder, begun, is_first)
    dataset, version = inputs.dataset.url, inputs.dataset.version
    mixed_in = inputs.mixed_in_versions()
    if begun is not None and begun.finished and _same_data(begun.spec.contents, contents):
        dataset, version = begun.spec.dataset, begun.spec.dataset_version
        mixed_in = _as_begun(begun, mixed_in)
    caption, vqa = recipe.benchmarks.caption, recipe.benchmarks.vqa
    pictures = None
    if phase != "blind":
        pictures = PictureRange.of(inputs.split(recipe.dataset.train_split)).to_json()
    config = recipe.model.config(
        vocab_size=len(load_tokenizer(tokenizer)),
        feature_dim=inputs.extractor.dim,
        num_answers=len(answers),
    )
    return TrainingSpec(
        phase=phase,
        folder=folder,
        dataset=dataset,
        dataset_version=version,
        split=recipe.dataset.train_split,
        mixed_in=mixed_in,
        held_out_split=recipe.dataset.validation_split if training.evaluation.every_steps else None,
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
        contents=contents,
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
            "extractor": inputs.extractor.plain(),
            "objectives": objectives.settings(),
            "training": training.model_dump(mode="json"),
            "seed": recipe.training.seed,
        },
    )


def _contents(recipe: Recipe, inputs: DataInputs, training: TrainingConfig) -> dict[str, str]:
    """Returns digests of what there is to learn from, by the recipe's keys.

    Of held-out samples only where they decide when the run ends or which weights it leaves.
    """
    splits = [recipe.dataset.train_split]
    if training.evaluation.patience is not None or training.evaluation.restore_best:
        splits.append(recipe.dataset.validation_split)
    found = {f"{DATA}.path: split {split}": inputs.dataset.content(split) for split in splits}
    for number, (other, part) in enumerate(inputs.mixed_in):
        found[f"{DATA}.mixed_in.{number}.path"] = other.content(part.split)
    return found


def _contents_of_start(recipe: Recipe) -> dict[str, str]:
    """Returns what a phase begins with that no other phase makes: its weights and its words."""
    found = {}
    if recipe.model.initial is not None:
        found["model.initial"] = _content(recipe.model.initial)
    if recipe.model.tokenizer is None:
        found["model.vocab_size"] = str(recipe.model.vocab_size)
    else:
        words = load_tokenizer(recipe.model.tokenizer).get_vocab()
        found["model.tokenizer"] = identity(words)
    return found


def _same_data(then: Mapping[str, str] | None, now: Mapping[str, str]) -> bool:
    """Whether there is the same to learn from, wherever it lies by now."""
    if then is None:  # an older release did not record it
        return True
    return all(then[key] == now[key] for key in then.keys() & now.keys() if key.startswith(DATA))


def _as_begun(begun: Begun, mixed_in: tuple[MixedIn, ...]) -> tuple[MixedIn, ...]:
    """Returns the datasets beside the own one in the versions that a phase was begun with."""
    absent = {"dataset_version"}
    if begun.finished:  # of which the content has been compared, wherever it lies
        absent.add("dataset")
    then = [one.model_dump(exclude=absent) for one in begun.spec.mixed_in]
    now = [one.model_dump(exclude=absent) for one in mixed_in]
    return begun.spec.mixed_in if then == now else mixed_in


def _tokenizer(
    recipe: Recipe, inputs: DataInputs, folder: str, begun: Begun | None, is_first: bool
) -> str:
    """Returns the folder of the tokenizer that a phase reads with.

    A phase keeps the one that it was begun with, and one that starts from another phase's model
    has that model's; the others have the recipe's.
    """
    own = storage.join(folder, "tokenizer")
    if begun is not None and storage.exists(own):
        return own
    pretrained = storage.join(recipe.run, "pretrain", "tokenizer")
    if not is_first and storage.exists(pretrained):
        return storage.absolute(pretrained)
    shared = storage.absolute(storage.join(recipe.run, "tokenizer"))
    if begun is None or not storage.exists(shared):
        prepare_tokenizer(recipe, inputs)
    return shared


def check_fits(spec: TrainingSpec, inputs: DataInputs, workers: int) -> None:
    """Refuses what the data cannot feed, before a worker starts."""
    splits = [spec.split]
    if spec.training.evaluation.every_steps is not None and spec.held_out_split is not None:
        splits.append(spec.held_out_split)
    for split in map(inputs.split, splits):
        for objective in ObjectivesConfig.model_validate(spec.objectives).build():
            kind = objective.stream.kind
            num_examples = split.num_texts(kind)
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
            tokenizer = build_tokenizer(_sentences(split), recipe.model.vocab_size)
        storage.remove(folder)  # each phase that has begun has a copy
        save_tokenizer(tokenizer, folder)
        return {"tokens": len(tokenizer)}

    once(recipe.run, "tokenizer", parts, work, [storage.join(folder, "tokenizer_config.json")])


def _sentences(split: Split) -> Iterator[str]:
    """Yields the captions and questions of all samples."""
    for texts in texts_of(split):
        yield from texts.captions
        yield from (question.question for question in texts.questions)


def _pretrained(recipe: Recipe) -> str:
    """Returns the model folder that fine-tuning starts from where there is a phase before it."""
    return storage.join(recipe.run, "pretrain", "model")


def _teachers(locations: Mapping[str, str]) -> dict[str, str]:
    """Returns what is in each model that is learned from; ConfigError for one with a backbone."""
    for key, place in locations.items():
        if backbone_config(extractor_of(read_own(place))):
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
