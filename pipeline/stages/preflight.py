"""What can be refused before work: names in a recipe of what is not there, or of no use to it.

Files, weights to begin with, keys of DeepSpeed and, as soon as there is a dataset, its splits and
texts.
"""

import torch

from pipeline import storage
from pipeline.data.dataset import Dataset
from pipeline.data.vocabulary import load_tokenizer
from pipeline.errors import ConfigError, FeatureError, ModelError
from pipeline.model_files import is_model
from pipeline.models import families
from pipeline.models.layouts import LoadReport
from pipeline.recipe import Recipe
from pipeline.training.engine import require_known_keys, require_precision
from pipeline.training.model_folder import initialise, require_same_words
from pipeline.training.spec import Environment

FEW_SAMPLES = 20  # of a held-out split: fewer tell little


def preflight(recipe: Recipe) -> None:
    """Raises ConfigError naming the key, for every missing file and unknown key at once."""
    faults = []
    needed = {
        "model.initial": recipe.model.initial,
        "model.tokenizer": recipe.model.tokenizer,
        **recipe.teachers(),
        **{
            f"dataset.mixed_in.{number}.path": other.path
            for number, other in enumerate(recipe.dataset.mixed_in)
        },
        **{
            f"dataset.source.{key}": location
            for key, location in recipe.dataset.source.locations().items()
        },
    }
    for key, location in needed.items():
        if location is not None and not storage.exists(location):
            faults.append(f"{key}: {location}: no such file or folder; give its path, as `{key}=…`")
    if not faults:
        try:
            initial_weights(recipe)
        except ConfigError as error:
            faults.append(str(error))
    try:
        recipe.features.extractor.check()
    except FeatureError as error:
        faults.append(f"features.extractor: {error}")
    try:
        recipe.trackers.check()
    except ConfigError as error:
        faults.append(str(error))
    device = "cuda:0" if recipe.cluster.gpus_per_worker else "cpu"
    rank = Environment(0, recipe.cluster.workers, 0, device)
    for name in ("pretrain", "finetune"):
        training = getattr(recipe.training, name)
        if training is not None:
            try:
                require_known_keys(training, rank, f"training.{name}.deepspeed")
                if recipe.cluster.address is None:  # else other machines compute
                    require_precision(training, rank, f"training.{name}.precision")
            except ConfigError as error:
                faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(faults))


def initial_weights(recipe: Recipe) -> LoadReport | None:
    """Returns what the first phase will take over of `model.initial`; None if it begins anew.

    Raises ConfigError if these weights cannot start the recipe's model. What the data decides is
    not known yet: the answers, and the width of features.
    """
    location, tokenizer = recipe.model.initial, recipe.model.tokenizer
    if location is None:
        return None
    if tokenizer is None and not is_model(location):
        raise ConfigError(
            f"model.initial: {location}: its words are numbered as by its own vocabulary, and "
            "model.tokenizer is null, which builds another one; give its vocab.txt or folder as "
            "model.tokenizer"
        )
    if tokenizer is None:
        tokenizer = location
    require_same_words(tokenizer, location)
    sizes = recipe.model.config(vocab_size=len(load_tokenizer(tokenizer)), feature_dim=2048)
    try:
        with torch.device("meta"):
            return initialise(families.build(sizes), location, fresh=("answer_head",))
    except ModelError as error:
        raise ConfigError(f"model.initial: {error}") from error


def require_splits(recipe: Recipe, dataset: Dataset) -> None:
    """Raises ConfigError if a split that the recipe names lacks samples, or texts of a benchmark.

    All faults are told at once.
    """
    part = recipe.dataset
    named = {"dataset.train_split": (dataset, part.train_split)}
    named["dataset.validation_split"] = (dataset, part.validation_split)
    for number, other in enumerate(part.mixed_in):
        named[f"dataset.mixed_in.{number}.split"] = (Dataset.open(other.path), other.split)
    faults = []
    for key, (source, name) in named.items():
        sizes = source.split_sizes()
        if name not in sizes:
            known = ", ".join(f"{split} ({size} samples)" for split, size in sizes.items())
            faults.append(
                f"{key}: found {name!r}, of which {source.url} has no sample; "
                f"its splits are {known or 'none: every sample was rejected or removed'}"
            )
    if not faults:
        for key in ("dataset.train_split", "dataset.validation_split"):
            split = dataset.split(named[key][1])
            faults += [
                f"{key}: split {split.name!r} has {split.num_samples} samples and no "
                f"{benchmark.kind}, of which benchmarks.{name} is; choose another split, or leave "
                "this benchmark out"
                for name, benchmark in recipe.benchmarks.build().items()
                if not split.counts(benchmark.kind).any()
            ]
    if faults:
        raise ConfigError("\n".join(faults))


def small_validation(recipe: Recipe, dataset: Dataset) -> str | None:
    """Says so if what is held out is so little that its figures are mostly chance."""
    name = recipe.dataset.validation_split
    size = dataset.split_sizes().get(name, 0)
    if size >= FEW_SAMPLES:
        return None
    return (
        f"dataset.validation_split: split {name!r} has {size} samples; figures of so few are "
        "mostly chance: hold out more"
    )
