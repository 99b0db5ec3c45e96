from pathlib import Path

import numpy as np
import pytest

from pipeline.data.tars.members import Members, Places
from pipeline.data.tars.shard_files import ShardFiles
from pipeline.errors import ShardError


def places(offsets: list[int], rows: list[int]) -> Places:
    columns = (
        np.array([0, 1, 0]),
        np.array(offsets),
        np.array([3, 2, 4]),
        np.array([*"abc"], object),
    )
    return Places(*(column[rows] for column in columns))


def members(folder: Path, locations: list[str]) -> Members:
    return Members(ShardFiles(folder / "cache"), locations.__getitem__)


def two_files(folder: Path) -> list[str]:
    (folder / "one").write_bytes(b"0123456789")
    (folder / "two").write_bytes(b"abcdef")
    return [str(folder / "one"), str(folder / "two")]


def test_each_row_comes_from_its_own_place_in_any_order(tmp_path: Path) -> None:
    found = members(tmp_path, two_files(tmp_path))
    wanted = places([1, 4, 6], [2, 0, 1, 0])
    assert found.read(wanted) == [b"6789", b"123", b"ef", b"123"]
    buffer = bytearray(12)
    view = memoryview(buffer)
    found.read_into(wanted, [[view[:1], view[1:4]], [view[4:7]], [view[7:9]], [view[9:]]])
    assert buffer == b"6789123ef123"


def views(wanted: Places) -> list[list[memoryview]]:
    return [[memoryview(bytearray(size))] for size in wanted.sizes.tolist()]


def test_the_row_that_is_cut_short_is_named(tmp_path: Path) -> None:
    found = members(tmp_path, two_files(tmp_path))
    for rows in ([0, 1, 2], [1]):
        wanted = places([1, 5, 6], rows)
        with pytest.raises(ShardError, match=r"two: sample .*b.*expected 2 bytes at offset 5, fo"):
            found.read(wanted)
        with pytest.raises(ShardError, match="expected 2 bytes at offset 5, found 1"):
            found.read_into(wanted, views(wanted))


def test_the_row_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    locations = two_files(tmp_path)
    found = members(tmp_path, [locations[0], str(tmp_path)])  # a folder opens
    wanted = places([1, 0, 6], [2, 0, 1])
    with pytest.raises(ShardError, match=r"sample .*'b'.*cannot be read .*directory"):
        found.read(wanted)
    with pytest.raises(ShardError, match=r"sample .*'b'.*cannot be read .*directory"):
        found.read_into(wanted, views(wanted))
