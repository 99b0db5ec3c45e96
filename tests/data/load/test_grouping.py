from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.load.grouping import group, length
from pipeline.data.sample import Dialog, Question, Round, Texts


@given(st.lists(st.integers(0, 9), min_size=4, max_size=40), st.integers(1, 4))
def test_every_place_is_in_one_group_and_groups_follow_by_length(
    lengths: list[int], num_micro_batches: int
) -> None:
    groups = [places.tolist() for places in group(lengths, num_micro_batches)]
    assert len(groups) == num_micro_batches
    assert max(map(len, groups)) - min(map(len, groups)) == bool(len(lengths) % num_micro_batches)
    assert sorted(place for places in groups for place in places) == list(range(len(lengths)))
    assert all(places == sorted(places) for places in groups)
    for one, other in pairwise(groups):
        assert max(lengths[place] for place in one) <= min(lengths[place] for place in other)


def test_equal_lengths_leave_the_order_as_it_is() -> None:
    assert [places.tolist() for places in group([7] * 5, 3)] == [[0, 1], [2, 3], [4]]
    assert [places.tolist() for places in group([3, 1, 2, 1], 2)] == [[1, 3], [0, 2]]


def test_a_length_is_that_of_what_is_read() -> None:
    rounds = (Round("why?", "so"), Round("when?", "now"))
    texts = Texts(
        1,
        captions=("a", "abc"),
        questions=(Question(1, "what?", ("a long answer",)),),
        dialogs=(Dialog("ab", rounds), Dialog("abcd", rounds)),
    )
    assert [length(texts, "captions", i) for i in range(2)] == [1, 3]
    assert length(texts, "questions", 0) == 5
    assert [length(texts, "rounds", i) for i in range(4)] == [6, 13, 8, 15]
    with pytest.raises(IndexError, match="4 rounds"):
        length(texts, "rounds", 4)
