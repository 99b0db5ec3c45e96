"""The published model: what fine-tuning leaves in RUN/model."""

from pipeline import storage
from pipeline.pretrained.files import OWN, is_model
from pipeline.recipe import Recipe
from pipeline.stages.changed import aside
from pipeline.stages.progress import StageProgress


def publish(recipe: Recipe, model: str, progress: StageProgress) -> None:
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
