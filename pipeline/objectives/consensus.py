"""The worth of an answer, by people's answers to the same question."""

from collections.abc import Sequence


def consensus(answer: str, given: Sequence[str]) -> float:
    """Returns VQA's accuracy of an answer, 0 to 1 (Antol et al., arXiv:1505.00468, 3).

    For each person in turn: a third of the number of others who gave this answer, at most 1;
    then the mean. Of ten people one is worth 0.3, two 0.6, three 0.9, four or more 1. A data set
    with one answer per question, which others would never confirm, counts as ten people agreeing.
    """
    people = list(given) * 10 if len(given) == 1 else given
    agreeing = sum(one == answer for one in people)
    scores = [min(1.0, (agreeing - (one == answer)) / 3) for one in people]
    return sum(scores) / len(scores)
