from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.load.packing import cut_by_tokens


def arrays(passes: int, count: int) -> st.SearchStrategy[np.ndarray]:
    row = st.lists(st.integers(0, 9), min_size=count, max_size=count)
    return st.lists(row, min_size=passes, max_size=passes).map(np.array)


@given(st.data(), st.integers(1, 12), st.integers(1, 60), st.integers(1, 5))
def test_every_example_is_in_one_micro_batch_that_is_not_too_large(
    data: st.DataObject, count: int, max_tokens: int, max_samples: int
) -> None:
    lengths = [data.draw(arrays(2, count)), data.draw(arrays(1, count))]
    micro_batches = cut_by_tokens(lengths, max_tokens, max_samples)
    for number, of_kind in enumerate(lengths):
        groups = [indices[number].tolist() for indices in micro_batches]
        assert sorted(index for indices in groups for index in indices) == list(range(count))
        assert all(indices == sorted(indices) for indices in groups)
        whole = of_kind.sum(axis=0)
        for one, other in pairwise(groups):
            assert max(whole[one]) <= min(whole[other])
    for of_kinds in micro_batches:
        assert len({len(indices) for indices in of_kinds}) == 1
        padded = sum(
            len(indices) * int(of_kind[:, indices].max(axis=1).sum())
            for of_kind, indices in zip(lengths, of_kinds, strict=True)
        )
        assert len(of_kinds[0]) == 1 or (padded <= max_tokens and len(of_kinds[0]) <= max_samples)


def test_what_is_too_long_is_by_itself_and_no_room_is_left_unused() -> None:
    lengths = np.array([[5, 2, 30, 2, 4, 2]])
    found = [
        indices.tolist() for (indices,) in cut_by_tokens([lengths], max_tokens=10, max_samples=9)
    ]
    assert found == [[1, 3, 5], [0, 4], [2]]
    found = [
        indices.tolist() for (indices,) in cut_by_tokens([lengths], max_tokens=10, max_samples=2)
    ]
    assert found == [[1, 3], [4, 5], [0], [2]]
