"""What can be refused before any work: files that a recipe names and that are not there."""

from pipeline import storage
from pipeline.errors import ConfigError, FeatureError
from pipeline.recipe import Recipe


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
