import io
import tarfile
from random import Random

import pytest

from pipeline import storage
from pipeline.data.tars.read_ahead import ReadAhead, ReadAheadFile
from pipeline.errors import StorageError
from tests.data.requested import ranges

SIZE_BYTES = 3_000_001


@pytest.fixture
def remote(object_store: str) -> tuple[str, bytes]:
    payload = Random(0).randbytes(SIZE_BYTES)
    storage.write_bytes(f"{object_store}/file", payload)
    return f"{object_store}/file", payload


def test_small_reads_in_a_row_are_few_requests_of_each_byte_once(
    remote: tuple[str, bytes],
) -> None:
    location, payload = remote
    file = ReadAhead(location)
    with ranges(location) as asked:
        offset = 0
        while offset < SIZE_BYTES:
            found = file.read(offset, 5000)
            assert found == payload[offset : offset + 5000]
            offset += 7000
    assert len(asked) <= 7
    assert sum(map(len, asked)) <= SIZE_BYTES


def test_scattered_reads_fetch_little_more_than_themselves(remote: tuple[str, bytes]) -> None:
    location, payload = remote
    file = ReadAhead(location)
    file.read(0, 100)
    with ranges(location) as asked:
        for offset in (2_000_000, 1_000_000, 2_500_000, 500_000):
            assert file.read(offset, 300) == payload[offset : offset + 300]
            assert file.read(offset + 300, 9) == payload[offset + 300 : offset + 309]
    assert [len(each) for each in asked] == [16 * 1024] * 4


def test_a_large_read_is_one_request_for_it_and_large_gaps_are_not_fetched(
    remote: tuple[str, bytes],
) -> None:
    location, payload = remote
    file = ReadAhead(location)
    with ranges(location) as asked:
        for offset in (0, 1_500_000):
            assert file.read(offset, 1_000_000) == payload[offset : offset + 1_000_000]
    assert asked == [range(1_000_000), range(1_500_000, 2_500_000)]


def test_reads_end_with_the_file(remote: tuple[str, bytes]) -> None:
    location, payload = remote
    file = ReadAhead(location)
    assert file.read(SIZE_BYTES - 5, 100) == payload[-5:]
    assert file.read(SIZE_BYTES, 1) == file.read(2 * SIZE_BYTES, 1) == b""
    with pytest.raises(StorageError, match="no such file"):
        ReadAhead(f"{location}-absent")


def test_a_file_that_vanishes_is_an_error(remote: tuple[str, bytes]) -> None:
    location, _ = remote
    file = ReadAhead(location)
    storage.remove(location)
    with pytest.raises(StorageError, match="file"):
        file.read(0, 10)


def test_a_tar_lists_as_it_does_from_a_disk(object_store: str) -> None:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as writer:
        for number, size_bytes in enumerate((0, 5, 700_000, 512, 3, 100_000)):
            member = tarfile.TarInfo(f"{number}" * 120)  # takes a header of its own
            member.size = size_bytes
            writer.addfile(member, io.BytesIO(Random(number).randbytes(size_bytes)))
    storage.write_bytes(f"{object_store}/a.tar", tar.getvalue())
    with (
        ReadAheadFile(f"{object_store}/a.tar") as file,
        tarfile.open(fileobj=file, mode="r:") as found,
        tarfile.open(fileobj=io.BytesIO(tar.getvalue())) as expected,
    ):
        assert found.getnames() == expected.getnames()
        for one, other in zip(found, expected, strict=True):
            assert one.offset_data == other.offset_data
            assert found.extractfile(one).read() == expected.extractfile(other).read()  # type: ignore[union-attr]
