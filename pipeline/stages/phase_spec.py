"""The specification of a training phase, as the recipe wants it."""

from collections.abc import Mapping, Sequence

from pipeline import storage
from pipeline.data.text.picture_range import PictureRange
from pipeline.data.text.vocabulary import load_tokenizer
from pipeline.errors import ConfigError, PipelineError
from pipeline.objectives.objective import ObjectivesConfig
from pipeline.pretrained.files import digest, extractor_of, read_own
from pipeline.recipe import Recipe
from pipeline.stages.changed import Begun
from pipeline.stages.data_inputs import DataInputs, as_begun
from pipeline.stages.state import identity
from pipeline.stages.tokenizer import tokenizer_of_phase
from pipeline.training.config import TrainingConfig
from pipeline.training.spec import TrainingSpec
from pipeline.vision.extractors.live import backbone_config

DATA = "dataset"  # the part of the recipe that says what there is to learn from


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
    initial = recipe.model.initial if is_first else pretrained_model(recipe)
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
        contents["training.pretrain: its model"] = _content(pretrained_model(recipe))
    teachers = objectives.locations()
    part = "objectives" if phase == "pretrain" else "benchmarks"
    contents |= {f"{part}.{key}": digest for key, digest in _teachers(teachers).items()}
    tokenizer = tokenizer_of_phase(recipe, inputs, folder, begun, is_first)
    dataset, version = inputs.dataset.url, inputs.dataset.version
    mixed_in = inputs.mixed_in_versions()
    if begun is not None and begun.finished and _same_data(begun.spec.contents, contents):
        dataset, version = begun.spec.dataset, begun.spec.dataset_version
        mixed_in = as_begun(begun, mixed_in)
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


def pretrained_model(recipe: Recipe) -> str:
    """Returns the model folder that fine-tuning starts from where there is a phase before it."""
    return storage.join(recipe.run, "pretrain", "model")


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
