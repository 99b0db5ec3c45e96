import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from pipeline import storage
from pipeline.data.tars.shard_files import ShardFiles, default_cache
from pipeline.errors import ShardError


def make_remote(name: str, content: bytes) -> str:
    """An object in fsspec's in-memory store, which storage treats as any object store."""
    location = f"memory://bucket/{name}.tar"
    fsspec.filesystem("memory").pipe_file(f"/bucket/{name}.tar", content)
    return location


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_no_more_files_than_the_bound_stay_open(tmp_path: Path) -> None:
    files = ShardFiles(tmp_path / "cache", max_open=3)
    before = open_files()
    for number in range(8):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(b"shard %d" % number)
        assert os.pread(files.open(str(path)).descriptor, 7, 0) == b"shard %d" % number
    assert open_files() == before + 3
    del files
    assert open_files() == before


def test_a_file_that_is_held_stays_open_beyond_the_bound(tmp_path: Path) -> None:
    files = ShardFiles(tmp_path / "cache", max_open=1)
    for name in ("first", "second"):
        (tmp_path / name).write_bytes(name.encode())
    first = files.open(str(tmp_path / "first"))
    files.open(str(tmp_path / "second"))
    assert os.pread(first.descriptor, 5, 0) == b"first"


def test_a_remote_shard_is_copied_once_for_all_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = make_remote("once", b"remote")
    copied: list[str] = []
    copy = storage.local_copy

    def counted(location: str, cache: Path) -> Path:
        copied.append(location)
        return copy(location, cache)

    monkeypatch.setattr(storage, "local_copy", counted)
    files = ShardFiles(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        for file in pool.map(files.open, [location] * 40):
            assert os.pread(file.descriptor, 6, 0) == b"remote"
    assert copied == [location]


def test_the_cache_stays_within_its_bound_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    locations = {name: make_remote(name, bytes(100)) for name in "abcd"}
    for age, name in ((30, "a"), (20, "b"), (10, "c")):
        ShardFiles(tmp_path, cache_size_bytes=300).open(locations[name])
        used = (tmp_path / "bucket" / f"{name}.tar").stat().st_mtime - age
        os.utime(tmp_path / "bucket" / f"{name}.tar", (used, used))
    assert len(list(tmp_path.rglob("*.tar"))) == 3
    ShardFiles(tmp_path, cache_size_bytes=300).open(locations["a"])  # from the cache: used now
    ShardFiles(tmp_path, cache_size_bytes=300).open(locations["d"])
    assert {path.stem for path in tmp_path.rglob("*.tar")} == {"a", "c", "d"}


def test_a_shard_larger_than_the_cache_is_still_read(tmp_path: Path) -> None:
    location = make_remote("large", bytes(500))
    file = ShardFiles(tmp_path, cache_size_bytes=100).open(location)
    assert len(os.pread(file.descriptor, 500, 0)) == 500


def test_an_evicted_file_stays_readable_while_it_is_open(tmp_path: Path) -> None:
    files = ShardFiles(tmp_path, cache_size_bytes=100)
    first = files.open(make_remote("first", b"1" * 100))
    files.open(make_remote("second", b"2" * 100))
    assert {path.stem for path in tmp_path.rglob("*.tar")} == {"second"}
    assert os.pread(first.descriptor, 3, 0) == b"111"


def test_what_was_fetched_is_opened_without_another_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = make_remote("fetched", b"remote")
    files = ShardFiles(tmp_path)
    files.fetch(location)
    fsspec.filesystem("memory").rm("/bucket/fetched.tar")
    monkeypatch.setattr(storage, "publish", None)
    assert os.pread(files.open(location).descriptor, 6, 0) == b"remote"


def test_no_more_is_fetched_ahead_than_half_of_the_cache(tmp_path: Path) -> None:
    files = ShardFiles(tmp_path, cache_size_bytes=400)
    locations = [make_remote(f"ahead-{n}", bytes(100)) for n in range(4)]
    for location in locations:
        files.fetch(location)
    assert {path.stem for path in tmp_path.rglob("*.tar")} == {"ahead-0", "ahead-1"}
    files.open(locations[0])
    for location in locations:
        files.fetch(location)
    assert {path.stem for path in tmp_path.rglob("*.tar")} == {"ahead-0", "ahead-1", "ahead-2"}


def test_a_local_shard_is_not_fetched(tmp_path: Path) -> None:
    ShardFiles(tmp_path / "cache").fetch(str(tmp_path / "absent.tar"))
    assert list(tmp_path.iterdir()) == []


def test_fetching_an_absent_shard_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"gone\.tar"):
        ShardFiles(tmp_path).fetch("memory://bucket/gone.tar")


def test_a_copy_that_a_killed_process_left_half_made_goes_in_the_end(tmp_path: Path) -> None:
    abandoned, growing = tmp_path / ".a.tar.01.partial", tmp_path / ".b.tar.02.partial"
    for path in (abandoned, growing):
        path.write_bytes(bytes(100))
    two_hours_ago = time.time() - 7200
    os.utime(abandoned, (two_hours_ago, two_hours_ago))
    ShardFiles(tmp_path, cache_size_bytes=150).open(make_remote("one", bytes(100)))
    assert {path.name for path in tmp_path.rglob("*") if path.suffix} == {"one.tar", growing.name}


RANK = """
import sys
from pathlib import Path
from pipeline import storage
from pipeline.data.tars.shard_files import ShardFiles
copies, publish = [], storage.publish
storage.publish = lambda location, durable=False: copies.append(1) or publish(location, durable)
files = ShardFiles(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for location in sys.argv[2:]:
    files.open(location)
print(len(copies), flush=True)
"""


@pytest.mark.processes
def test_ranks_of_a_machine_share_one_copy_of_each_shard(object_store: str, tmp_path: Path) -> None:
    locations = [f"{object_store}/{n}.tar" for n in range(5)]
    for location in locations:
        storage.write_bytes(location, bytes(300_000))
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", RANK, str(tmp_path), *locations]
    ranks = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
        )
        for _ in range(3)
    ]
    for rank in ranks:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "ready\n"
    copies = [int(rank.communicate("go\n")[0]) for rank in ranks]
    assert sum(copies) == len(locations)
    assert len(list(tmp_path.rglob("*.tar"))) == len(locations)


def test_an_absent_shard_is_an_error_that_names_it(tmp_path: Path) -> None:
    files = ShardFiles(tmp_path)
    with pytest.raises(ShardError, match=r"gone\.tar: the manifest lists this file"):
        files.open(str(tmp_path / "gone.tar"))
    with pytest.raises(ShardError, match=r"memory://bucket/gone\.tar: .*no such file"):
        files.open("memory://bucket/gone.tar")


def test_the_environment_may_move_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGHTLINE_CACHE", "/somewhere/else")
    assert default_cache() == Path("/somewhere/else")
    monkeypatch.delenv("SIGHTLINE_CACHE")
    assert default_cache() == Path.home() / ".cache" / "sightline"
