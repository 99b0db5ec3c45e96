"""The refusals before work: names in a recipe of what is not there, or of no use to it.

Files, devices, weights to begin with, keys of DeepSpeed and, as soon as there is a dataset, its
splits and texts.
"""

from collections.abc import Sequence

import torch
import yaml

from pipeline import storage
from pipeline.data.manifest.table import require_usable
from pipeline.data.read.dataset import Dataset
from pipeline.data.text.vocabulary import load_tokenizer
from pipeline.errors import ConfigError, FeatureError, ManifestError, ModelError, StorageError
from pipeline.models import families
from pipeline.models.layouts import LoadReport
from pipeline.pretrained.files import is_model
from pipeline.pretrained.folder import initialise, require_same_words
from pipeline.recipe import Recipe
from pipeline.stages.devices import missing_devices
from pipeline.training.engine.requirements import require_known_keys, require_precision
from pipeline.training.spec import RankContext

FEW_SAMPLES = 20  # of a held-out split: fewer tell little


def preflight(recipe: Recipe, stages: Sequence[str] = ()) -> None:
    """Raises ConfigError naming the key, for every missing file and unknown key at once.

    `stages` are those that are to be run: the devices that they ask for have to be there.
    """
    faults = list(missing_devices(recipe, stages))
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
        elif location is not None and not storage.is_readable(location):
            faults.append(f"{key}: {location}: neither a file nor a folder, but a FIFO or a device")
    faults += _misplaced(recipe)
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
    rank = RankContext(0, recipe.cluster.workers, 0, device)
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


def require_writable(run: str) -> None:
    """Makes the run's folder; raises ConfigError if nothing can be written in it."""
    probe = storage.join(run, ".writable")
    try:
        storage.write_bytes(probe, b"")
        storage.remove(probe)
    except (StorageError, OSError) as error:
        raise ConfigError(f"run: {run}: {error}; choose another folder, as `run=…`") from error


def _misplaced(recipe: Recipe) -> list[str]:
    """Returns what is wrong with where the run and the dataset are to be."""
    run, dataset = (storage.absolute(at).rstrip("/") for at in (recipe.run, recipe.dataset.path))
    faults = [
        f"{key}: {location}: a file is there; give the path of a folder"
        for key, location in (("run", run), ("dataset.path", dataset))
        if storage.is_local(location)
        and storage.exists(location)
        and not storage.local_path(location).is_dir()
    ]
    try:
        require_usable(dataset)
    except ManifestError as error:
        faults.append(f"dataset.path: {error}")
    else:
        if run == dataset or storage.exists(storage.join(run, "manifest", "samples", "_delta_log")):
            faults.append(f"run: {run}: a dataset is there; give the run a folder of its own")
    owner = _name_of(run)
    if owner not in (None, recipe.name):
        faults.append(
            f"run: {run}: the run {owner!r} is there, and this one is {recipe.name!r}; give it a "
            "folder of its own, as `run=…`, or the same `name`"
        )
    return faults


def _name_of(run: str) -> str | None:
    """Returns the name of the run that has this folder, if there is one that can be read."""
    location = storage.join(run, "recipe.yaml")
    if not storage.exists(location):
        return None
    try:
        document = yaml.safe_load(storage.read_bytes(location))
    except (StorageError, yaml.YAMLError, ValueError):
        return None  # it is written anew
    return str(document["name"]) if isinstance(document, dict) and "name" in document else None


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
                if not split.num_texts(benchmark.kind)
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
