import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import s3fs

from pipeline import storage
from pipeline.errors import StorageError
from tests.processes import DISK_AND_OBJECT_STORE


def test_a_file_appears_only_when_its_block_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "object"
    with pytest.raises(ValueError, match="half-way"), storage.publish(str(target)) as partial:
        partial.write_bytes(b"half")
        raise ValueError("half-way")
    assert list(target.parent.iterdir()) == []
    with storage.publish(str(target), durable=True) as partial:
        partial.write_bytes(b"whole")
        assert not target.exists()
    assert storage.read_bytes(str(target)) == b"whole"
    assert storage.list_names(str(target.parent)) == ["object"]


@pytest.mark.parametrize("where", DISK_AND_OBJECT_STORE)
def test_of_many_that_create_an_object_at_once_one_does(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = str(tmp_path) if where == "disk" else request.getfixturevalue("object_store")
    location = storage.join(folder, "deep", "object")
    start = threading.Barrier(8)
    created: list[int] = []

    def create(number: int) -> None:
        start.wait()
        if storage.create(location, b"%d" % number):
            created.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert storage.read_bytes(location) == b"%d" % created[0]
    assert len(created) == 1
    assert storage.list_names(storage.join(folder, "deep")) == ["object"]


def test_what_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file/object: cannot be written"):
        storage.create(str(tmp_path / "file" / "object"), b"")


def test_a_range_beyond_the_end_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    location = str(tmp_path / "short")
    storage.write_bytes(location, b"12345")
    assert storage.read_range(location, 1, 3) == b"234"
    with pytest.raises(StorageError, match=r"short: 9 bytes expected at offset 1, found 4"):
        storage.read_range(location, 1, 9)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere: no such file"):
        storage.read_bytes(str(tmp_path / "nowhere"))
    assert storage.list_names(str(tmp_path / "nowhere")) == []
    storage.remove(str(tmp_path / "nowhere"))


def test_an_unknown_kind_of_url_is_refused() -> None:
    with pytest.raises(StorageError, match="no driver for this kind of URL"):
        storage.read_bytes("nosuchscheme://bucket/key")


def test_a_file_is_read_piece_by_piece_on_a_disk(tmp_path: Path) -> None:
    location = str(tmp_path / "a.bin")
    storage.write_bytes(location, b"0123456789")
    with storage.reader(location) as file:
        file.seek(4)
        assert file.read(3) == b"456"
    with (
        pytest.raises(StorageError, match="nowhere: no such file"),
        storage.reader(str(tmp_path / "nowhere")),
    ):
        pass


def test_a_stamp_is_what_the_listing_of_its_folder_says(tmp_path: Path) -> None:
    location = str(tmp_path / "a.bin")
    storage.write_bytes(location, b"0123456789")
    assert storage.stamp(location) == storage.list_stamps(str(tmp_path))["a.bin"]
    with pytest.raises(StorageError, match="nowhere: no such file"):
        storage.stamp(str(tmp_path / "nowhere"))


def test_a_tilde_is_the_home_folder_in_every_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.write_bytes("~/deep/object", b"whole")
    assert (tmp_path / "deep" / "object").read_bytes() == b"whole"
    assert storage.absolute("~/deep/object") == str(tmp_path / "deep" / "object")
    assert storage.list_names("~/deep") == ["object"]
    assert storage.stamp("~/deep/object") == storage.stamp(str(tmp_path / "deep" / "object"))
    assert storage.exists("~")
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("~nobody-of-that-name/x") == str(
        tmp_path / "~nobody-of-that-name" / "x"
    )
    assert storage.absolute("x~") == str(tmp_path / "x~")


@pytest.mark.parametrize(
    "location",
    [
        "simplecache::http://127.0.0.1:9/x",
        "filecache::file:///etc/hostname",
        "zip://hostname::/tmp/x.zip",
        "nothing-of-the-kind://x",
    ],
)
def test_chains_of_urls_are_no_locations(location: str) -> None:
    with pytest.raises(StorageError, match="no driver for this kind of URL"):
        storage.read_bytes(location)


def test_two_colons_in_an_objects_name_are_part_of_it(object_store: str) -> None:
    location = f"{object_store}/a::b.jpg"
    storage.write_bytes(location, b"whole")
    assert storage.read_bytes(location) == b"whole"
    assert storage.list_names(object_store) == ["a::b.jpg"]


@pytest.mark.parametrize(
    ("folder", "name", "location"),
    [
        ("/a/b", "c.jpg", "/a/b/c.jpg"),
        ("/a/b", "./c//d.jpg", "/a/b/c/d.jpg"),
        ("/a/b", "../c.jpg", "/a/c.jpg"),
        ("/a/b", "../../../../c.jpg", "/c.jpg"),
        ("/a/b", "/c.jpg", "/c.jpg"),
        ("/a/b", "file:///c/../d.jpg", "/d.jpg"),
        ("/a/b", "~/c.jpg", "/a/b/~/c.jpg"),
        ("/a/b", "s3://c/d.jpg", "s3://c/d.jpg"),
        ("s3://a/b", "./c.jpg", "s3://a/b/c.jpg"),
        ("s3://a/b", "../../../c.jpg", "s3://a/c.jpg"),
        ("s3://a/b", "/c.jpg", "/c.jpg"),
        ("s3://a/b", "x::http://c", "x::http://c"),
    ],
)
def test_a_name_is_followed_from_its_folder(folder: str, name: str, location: str) -> None:
    assert storage.followed(folder, name) == location


def test_no_name_is_too_long_to_be_absent(tmp_path: Path) -> None:
    assert not storage.exists(f"{tmp_path}/{'x' * 300}")
    with pytest.raises(StorageError, match="NUL"):
        storage.exists(f"{tmp_path}/a\0b")


def test_a_folder_is_moved_with_all_it_holds_and_over_nothing(
    tmp_path: Path, object_store: str
) -> None:
    for root in (str(tmp_path), object_store):
        old, new = (storage.join(root, name) for name in ("a run", "a run.replaced-1"))
        for name in ("one", "deep/two"):
            storage.write_bytes(storage.join(old, name), name.encode())
        storage.move(old, new)
        assert not storage.exists(old)
        for name in ("one", "deep/two"):
            assert storage.read_bytes(storage.join(new, name)) == name.encode()
        storage.write_bytes(storage.join(old, "three"), b"")
        with pytest.raises(StorageError, match="there is something"):
            storage.move(old, new)
        assert storage.exists(storage.join(old, "three"))


_WRITES_FOR_EVER = """
import sys, time
from pipeline import storage
with storage.draft(sys.argv[1]) as draft:
    new = draft.path.with_suffix(".new")  # as safetensors writes: another file of that name
    new.write_bytes(b"half")
    new.replace(draft.path)
    print(draft.path, flush=True)
    time.sleep(600)
"""


def writing(folder: str, scratch: Path) -> tuple[subprocess.Popen[str], Path]:
    """Starts a process that is writing a file; returns it and where it writes."""
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITES_FOR_EVER, folder],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@pytest.mark.processes
@pytest.mark.parametrize("is_remote", [False, True])
def test_what_a_killed_writer_left_is_removed_by_the_next_and_a_living_ones_is_not(
    tmp_path: Path, is_remote: bool
) -> None:
    folder = "memory://data" if is_remote else str(tmp_path / "data")
    living, its_file = writing(folder, tmp_path)
    killed, left = writing(folder, tmp_path)
    other = left.with_name(left.name.replace(socket.gethostname(), "another-host"))
    try:
        assert left.parent == (tmp_path if is_remote else tmp_path / "data")
        killed.kill()
        killed.wait()
        assert left.exists()
        other.write_bytes(b"of another machine")
        third, _ = writing(folder, tmp_path)
        third.kill()
        third.wait()
        assert not left.exists()
        assert other.exists()
        assert its_file.read_bytes() == b"half"
    finally:
        living.kill()
        living.wait()


@pytest.mark.parametrize("has_credentials", [False, True])
def test_a_store_that_cannot_be_reached_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_credentials: bool
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")  # where nobody listens
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    if has_credentials:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    expected = "EndpointConnectionError" if has_credentials else "NoCredentialsError"
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        for use in (
            storage.read_bytes,
            storage.exists,
            storage.size_bytes,
            storage.list_names,
            storage.list_entries,
            storage.list_files,
            storage.remove,
            lambda location: storage.write_bytes(location, b""),
            lambda location: storage.read_range(location, 0, 1),
            lambda location: storage.local_copy(location, tmp_path),
        ):
            with pytest.raises(StorageError, match=rf"s3://bucket/a: .*{expected}"):
                use("s3://bucket/a")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_what_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for location in ("/proc/none/a", f"{tmp_path}/file/a", f"{tmp_path}/{'x' * 300}/a"):
        with pytest.raises(StorageError, match="cannot be written"):
            storage.write_bytes(location, b"")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(StorageError, match="memory://a/b: cannot be written"):
        storage.write_bytes("memory://a/b", b"")


def test_a_written_file_has_the_rights_of_any_other(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "a"), b"")
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
