"""A rank's share of a global batch to micro-batches of texts of similar length.

Texts of a micro-batch are padded to the longest, so that short ones beside long ones are work for
nothing. What is grouped is the share alone: which samples make a step, and which rank has them,
stays arithmetic on the step; every micro-batch has the same number of samples as before, so that
the mean of their losses is still the mean over the samples.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.data.dataset import TextKind
from pipeline.data.members import Int64Array
from pipeline.data.sample import Texts


def group(lengths: Sequence[int], micro_batch_size: int) -> Int64Array:
    """Returns places in the share for each micro-batch, shortest texts first: (micro-batches, M).

    Within a micro-batch places rise; of equal lengths the first place comes first.
    """
    by_length = np.argsort(np.asarray(lengths), kind="stable")
    return np.sort(by_length.reshape(-1, micro_batch_size), axis=1)


def length(texts: Texts, kind: TextKind, index: int) -> int:
    """Returns the characters of a caption, a question, or a round with all that was said before."""
    if kind == "captions":
        return len(texts.captions[index])
    if kind == "questions":
        return len(texts.questions[index].question)
    for dialog in texts.dialogs:
        if index < len(dialog.rounds):
            said = [dialog.caption]
            said += [
                part for turn in dialog.rounds[:index] for part in (turn.question, turn.answer)
            ]
            return sum(map(len, said)) + len(dialog.rounds[index].question)
        index -= len(dialog.rounds)
    raise IndexError(f"image {texts.image_id!r} has {texts.num_rounds} rounds")
