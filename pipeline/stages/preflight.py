"""What can be refused before any work: files that a recipe names and that are no use to it."""

import torch

from pipeline import storage
from pipeline.data.vocabulary import load_tokenizer
from pipeline.errors import ConfigError, FeatureError, ModelError
from pipeline.model_files import is_model
from pipeline.models import families
from pipeline.models.layouts import LoadReport
from pipeline.recipe import Recipe
from pipeline.training.model_folder import initialise, require_same_words


def preflight(recipe: Recipe) -> None:
    """Raises ConfigError naming the key, for every missing file at once."""
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
