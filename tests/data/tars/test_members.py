from pathlib import Path

import numpy as np
import pytest

from pipeline.data.tars.members import Members
from pipeline.data.tars.shard_files import ShardFiles
from pipeline.errors import ShardError

KEYS = np.array(["a", "b", "c"])
WHERE = np.array([0, 1, 0])


def members(folder: Path, locations: list[str], offsets: list[int]) -> Members:
    files = ShardFiles(folder / "cache")
    sizes = np.array([3, 2, 4])
    return Members(files, locations, WHERE, np.array(offsets), sizes, KEYS)


def two_files(folder: Path) -> list[str]:
    (folder / "one").write_bytes(b"0123456789")
    (folder / "two").write_bytes(b"abcdef")
    return [str(folder / "one"), str(folder / "two")]


def test_each_row_comes_from_its_own_place_in_any_order(tmp_path: Path) -> None:
    found = members(tmp_path, two_files(tmp_path), [1, 4, 6])
    rows = np.array([2, 0, 1, 0])
    assert found.read(rows) == [b"6789", b"123", b"ef", b"123"]
    buffer = bytearray(12)
    view = memoryview(buffer)
    found.read_into(rows, [[view[:1], view[1:4]], [view[4:7]], [view[7:9]], [view[9:]]])
    assert buffer == b"6789123ef123"
    assert found.are_local


def test_the_row_that_is_cut_short_is_named(tmp_path: Path) -> None:
    found = members(tmp_path, two_files(tmp_path), [1, 5, 6])
    for rows, size in ((np.array([0, 1, 2]), 2), (np.array([1]), 2)):
        views = [[memoryview(bytearray(int(found.sizes[row])))] for row in rows]
        with pytest.raises(ShardError, match=r"two: sample .*b.*expected 2 bytes at offset 5, fo"):
            found.read(rows)
        with pytest.raises(ShardError, match=f"expected {size} bytes at offset 5, found 1"):
            found.read_into(rows, views)


def test_the_row_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    locations = two_files(tmp_path)
    found = members(tmp_path, [locations[0], str(tmp_path)], [1, 0, 6])  # a folder opens
    rows = np.array([2, 0, 1])
    views = [[memoryview(bytearray(int(found.sizes[row])))] for row in rows]
    with pytest.raises(ShardError, match=r"sample .*'b'.*cannot be read .*directory"):
        found.read(rows)
    with pytest.raises(ShardError, match=r"sample .*'b'.*cannot be read .*directory"):
        found.read_into(rows, views)
