"""Micro-batches of texts of similar length.

Texts of a micro-batch are padded to the longest, so that short ones beside long ones are work for
nothing. What is grouped is the share alone: which samples make a step, which rank has them, and in
how many micro-batches, stays arithmetic on the step.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.data.read.dataset import TextKind
from pipeline.data.sample import Texts
from pipeline.data.tars.members import Int64Array


def group(lengths: Sequence[int], num_micro_batches: int) -> list[Int64Array]:
    """Returns places in the share for each micro-batch, shortest texts first.

    The first have one more than the last, if they cannot all have as many. Within a micro-batch
    places rise; of equal lengths the first place comes first.
    """
    by_length = np.argsort(np.asarray(lengths), kind="stable")
    return [np.sort(places) for places in np.array_split(by_length, num_micro_batches)]


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
