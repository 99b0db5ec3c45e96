import numpy as np
import torch

from pipeline.data.read.buffers import MAX_FREE_BLOCKS, BufferPool


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_begins_with_a_page() -> None:
    pool = BufferPool()
    held = [pool.empty((size, 3), np.float16) for size in (1, 7, 4096, 100_000)]
    assert [address(array) % 4096 for array in held] == [0] * 4


def test_memory_is_used_again_once_the_array_is_gone() -> None:
    pool = BufferPool()
    first = pool.empty((2, 3, 5), np.float16)
    assert first.shape == (2, 3, 5)
    assert first.dtype == np.float16
    place = address(first)
    del first
    assert address(pool.empty((5, 3, 2), np.int16)) == place


def test_memory_that_a_view_or_a_tensor_still_shows_is_never_used_again() -> None:
    pool = BufferPool()
    array = pool.empty((4, 6), np.float32)
    array[:] = 7
    view, tensor = array[1:3].reshape(-1)[::2], torch.from_numpy(array[3])
    del array
    for _ in range(3):
        other = pool.empty((4, 6), np.float32)
        other[:] = 1
    assert (view == 7).all()
    assert (tensor == 7).all()
    del view
    other = pool.empty((4, 6), np.float32)
    other[:] = 1
    assert (tensor == 7).all()


def test_no_more_than_the_bound_of_free_blocks_is_kept() -> None:
    pool = BufferPool()
    held = [pool.empty((3,), np.uint8) for _ in range(MAX_FREE_BLOCKS + 5)]
    del held
    assert [len(free) for free in pool._free.values()] == [MAX_FREE_BLOCKS]


def test_an_array_may_be_empty() -> None:
    assert BufferPool().empty((2, 0, 8), np.float16).shape == (2, 0, 8)
