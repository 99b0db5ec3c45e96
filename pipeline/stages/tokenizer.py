"""The tokenizer of a run: the recipe's, or one built from the training texts."""

from collections.abc import Iterator
from typing import Any

from pipeline import storage
from pipeline.benchmarks.base import texts_of
from pipeline.data.read.dataset import Split
from pipeline.data.text.vocabulary import build_tokenizer, load_tokenizer, save_tokenizer
from pipeline.recipe import Recipe
from pipeline.stages.changed import Begun
from pipeline.stages.data_inputs import DataInputs
from pipeline.stages.state import once


def tokenizer_of_phase(
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
