"""Every byte in and out: local paths and object stores by URL, published atomically.

A location is a plain string: a local path or a URL that fsspec knows (`s3://bucket/prefix`). A
local path may begin with `~` or `~user`, which every function here takes for the home folder.
fsspec's chains of URLs (`simplecache::http://…`) are no locations: a `::` is part of a name.
Nothing here is appended to or edited in place: an object appears whole or not at all.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import fsspec
import psutil  # type: ignore[import-untyped]

from pipeline.errors import StorageError

_HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:64]
_SCRATCH_OF_HERE = re.compile(rf"\..*\.{_HOST}\.(\d+)-[0-9a-f]{{8}}\.partial", re.DOTALL)
_tidied: set[Path] = set()  # the folders where this process has looked for what others left


def is_local(location: str) -> bool:
    """Whether the location is on this machine's file system."""
    return "://" not in location or location.startswith("file://")


def local_path(location: str) -> Path:
    """Returns a local location as a path; raises StorageError for an object store."""
    if not is_local(location):
        raise StorageError(f"{location}: expected a local path, found an object store URL")
    if "\0" in location:
        raise StorageError(f"{location!r}: no file's name holds a NUL character")
    path = location.removeprefix("file://")
    # Unlike that of pathlib this leaves the home folder of an unknown user alone.
    return Path(os.path.expanduser(path) if path.startswith("~") else path)  # noqa: PTH111


def join(location: str, *names: str) -> str:
    """Appends names to a location."""
    return "/".join([location.rstrip("/"), *names])


def is_absolute(location: str) -> bool:
    """Whether the location means the same from any working directory."""
    return not is_local(location) or local_path(location).is_absolute()


def absolute(location: str) -> str:
    """Returns the location such that it means the same from any working directory."""
    return str(local_path(location).absolute()) if is_local(location) else location


def scheme(location: str) -> str:
    """Returns a URL's scheme in lower case, such as `s3`; of a local path it is `file`."""
    return location.partition("://")[0].lower() if "://" in location else "file"


def followed(folder: str, name: str) -> str:
    """Returns the location that a name in a file leads to from an absolute folder.

    A name may be a location of its own. `.` and `..` are followed, up to the folder's root or
    bucket; `~` is an ordinary character here.
    """
    if "://" in name and scheme(name) != "file":
        return name
    root, path = "", name
    if scheme(name) == "file" and "://" in name:
        path = name.partition("://")[2]
    elif not name.startswith("/"):
        path = f"{folder}/{name}"
        if not is_local(folder):
            start, slashes, path = path.partition("://")
            bucket, _, path = path.partition("/")
            root = f"{start}{slashes}{bucket}"
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return f"{root}/{'/'.join(parts)}"


def read_bytes(location: str) -> bytes:
    """Returns all bytes of an object, or raises StorageError naming it."""
    try:
        if is_local(location):
            return local_path(location).read_bytes()
        filesystem, path = _object_store(location)
        filesystem.invalidate_cache()
        payload: bytes = filesystem.cat_file(path)
        return payload
    except FileNotFoundError as error:
        raise StorageError(f"{location}: no such file") from error
    except OSError as error:
        raise StorageError(f"{location}: cannot be read ({error})") from error


def read_range(location: str, offset: int, size_bytes: int) -> bytes:
    """Returns `size_bytes` bytes from `offset`, or raises StorageError if there are fewer."""
    try:
        if is_local(location):
            with local_path(location).open("rb") as file:
                payload = os.pread(file.fileno(), size_bytes, offset)
        else:
            filesystem, path = _object_store(location)
            payload = filesystem.cat_file(path, start=offset, end=offset + size_bytes)
    except OSError as error:
        raise StorageError(f"{location}: cannot be read ({error})") from error
    if len(payload) != size_bytes:
        raise StorageError(
            f"{location}: {size_bytes} bytes expected at offset {offset}, found {len(payload)}; "
            "the file was cut short"
        )
    return payload


@contextlib.contextmanager
def reader(location: str) -> Iterator[BinaryIO]:
    """Yields an object as a seekable file of bytes, fetched as it is read."""
    try:
        if is_local(location):
            if local_path(location).is_fifo():
                raise StorageError(f"{location}: it is a FIFO, not a file")  # it would wait
            with local_path(location).open("rb") as file:
                yield file
        else:
            filesystem, path = _object_store(location)
            filesystem.invalidate_cache()
            with filesystem.open(path, "rb") as file:
                yield file
    except FileNotFoundError as error:
        raise StorageError(f"{location}: no such file") from error
    except OSError as error:
        raise StorageError(f"{location}: cannot be read ({error})") from error


def write_bytes(location: str, payload: bytes) -> None:
    """Replaces an object; a reader sees the old bytes or the new, never a part."""
    with publish(location) as partial:
        partial.write_bytes(payload)


def create(location: str, payload: bytes) -> bool:
    """Writes an object unless there is one; whether this call did. Of many at once, one does.

    Raises StorageError if it cannot be written.
    """
    try:
        if not is_local(location):
            filesystem, path = _object_store(location)
            return _is_new(lambda: filesystem.pipe_file(path, payload, mode="create"))
        target = local_path(location)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            scratch.write_bytes(payload)
            # refuses a name that is taken, and shows the file whole
            return _is_new(lambda: os.link(scratch, target))
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{location}: cannot be written ({error})") from error


def _is_new(create: Callable[[], object]) -> bool:
    try:
        create()
    except FileExistsError:
        return False
    return True


def exists(location: str) -> bool:
    """Whether an object or folder is there now."""
    try:
        if is_local(location):
            return local_path(location).exists()
        filesystem, path = _object_store(location)
        filesystem.invalidate_cache()
        found: bool = filesystem.exists(path)
        return found
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise StorageError(f"{location}: cannot be looked up ({error})") from error


def is_readable(location: str) -> bool:
    """Whether it is a file or a folder, which reading does not wait for as it may for a FIFO."""
    if not is_local(location):
        return True
    path = local_path(location)
    return path.is_file() or path.is_dir()


def size_bytes(location: str) -> int:
    """Returns an object's size in bytes, or raises StorageError if it is absent."""
    try:
        if is_local(location):
            return local_path(location).stat().st_size
        filesystem, path = _object_store(location)
        filesystem.invalidate_cache()
        return int(filesystem.info(path)["size"])
    except FileNotFoundError as error:
        raise StorageError(f"{location}: no such file") from error
    except OSError as error:
        raise StorageError(f"{location}: cannot be looked up ({error})") from error


def list_names(location: str) -> list[str]:
    """Returns the sorted names directly under a folder; an absent folder is empty."""
    try:
        if is_local(location):
            folder = local_path(location)
            return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        filesystem, path = _object_store(location)
        filesystem.invalidate_cache()
        names = {name.rstrip("/").removeprefix(path) for name in filesystem.ls(path, False)}
        return sorted({name.rsplit("/", 1)[-1] for name in names if name})
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"{location}: cannot be listed ({error})") from error


class Entry(NamedTuple):
    """What a name in a folder stands for: a file, a folder, or something that cannot be read.

    `stamp` is a file's: it changes when the file does. `fault` says what the third kind is. An
    object store may have a file and a folder of one name. The name is "" of keys that end a
    folder's name by two slashes, which no location can tell.
    """

    name: str
    kind: Literal["file", "folder", "other"]
    stamp: str = ""
    fault: str = ""


def scan_entries(folder: str) -> Iterator[Entry]:
    """Yields what is directly in a folder, in no promised order.

    A stamp is the size with the modification time, or with the version or ETag an object store
    keeps. One listing, no file is opened. Raises StorageError if the folder is absent.
    """
    try:
        if is_local(folder):
            with os.scandir(local_path(folder)) as entries:
                yield from map(_local_entry, entries)
            return
        filesystem, path = _object_store(folder)
        filesystem.invalidate_cache()
        found = (_object_entry(path, entry) for entry in filesystem.ls(path, detail=True))
        yield from (entry for entry in found if entry is not None)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StorageError(f"{folder}: no such folder") from error
    except (OSError, ValueError) as error:  # ValueError: half a surrogate in its name
        raise StorageError(f"{folder}: cannot be listed ({error})") from error


def list_entries(folder: str) -> list[Entry]:
    """Returns what `scan_entries` yields, sorted by name."""
    return sorted(scan_entries(folder))


def list_stamps(folder: str) -> dict[str, str]:
    """Returns the files of `list_entries`, each with its stamp."""
    return {entry.name: entry.stamp for entry in list_entries(folder) if entry.kind == "file"}


def folder_identity(folder: str) -> tuple[int, int] | None:
    """Returns what is equal if and only if two local locations are one folder, or None.

    Raises StorageError if it is absent.
    """
    if not is_local(folder):
        return None
    try:
        status = local_path(folder).stat()
    except OSError as error:
        raise StorageError(f"{folder}: cannot be looked up ({error})") from error
    return status.st_dev, status.st_ino


def _local_entry(entry: os.DirEntry[str]) -> Entry:
    try:
        if entry.is_file():
            status = entry.stat()
            return Entry(entry.name, "file", f"{status.st_size}-{status.st_mtime_ns}")
        if entry.is_dir():
            return Entry(entry.name, "folder")
        mode = entry.stat().st_mode
        fault = next(
            (name for is_kind, name in _NO_FILES if is_kind(mode)), "neither file nor folder"
        )
    except FileNotFoundError:
        fault = "a link to nothing"
    except OSError as error:
        fault = "a link in a circle" if error.errno == errno.ELOOP else f"not to be had ({error})"
    return Entry(entry.name, "other", fault=fault)


_NO_FILES = (
    (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"), (stat.S_ISBLK, "a device"),
    (stat.S_ISCHR, "a device"),
)  # fmt: skip


def _object_entry(folder: str, entry: dict[str, Any]) -> Entry | None:
    """Returns None of the empty object that stands for a folder."""
    name = entry["name"].removeprefix(folder).removeprefix("/")
    if entry["type"] == "file":
        if name.rstrip("/"):
            return Entry(name, "file", f"{entry['size']}-{_object_version(entry)}")
        fault = "an object whose key ends in a slash, with bytes in it"
        return Entry("", "other", fault=fault) if entry["size"] else None
    if name.strip("/"):
        return Entry(name.rstrip("/"), "folder")
    return Entry("", "other", fault="a folder without a name: keys with two slashes in a row")


@dataclass(frozen=True)
class FileStatus:
    """How large a file is, and when its last byte was written: seconds since 1970."""

    size_bytes: int
    modified: float


def list_files(folder: str) -> dict[str, FileStatus]:
    """Returns the files directly in a folder, hidden ones included; an absent folder is empty."""
    try:
        if is_local(folder):
            with os.scandir(local_path(folder)) as entries:
                stats = {entry.name: entry.stat() for entry in entries if entry.is_file()}
            return {name: FileStatus(one.st_size, one.st_mtime) for name, one in stats.items()}
        filesystem, path = _object_store(folder)
        filesystem.invalidate_cache()
        return {
            entry["name"].rsplit("/", 1)[-1]: FileStatus(int(entry["size"]), _modified(entry))
            for entry in filesystem.ls(path, detail=True)
            if entry["type"] == "file"
        }
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StorageError(f"{folder}: cannot be listed ({error})") from error


def stamp(location: str) -> str:
    """Returns one file's stamp, as `list_stamps` does, or raises StorageError if it is absent."""
    folder, _, name = location.rpartition("/")
    stamps = list_stamps(folder or ".")
    if name not in stamps:
        raise StorageError(f"{location}: no such file")
    return stamps[name]


def file_status(location: str) -> FileStatus | None:
    """Returns a file's status now, or None if it is absent."""
    try:
        if is_local(location):
            status = local_path(location).stat()
            return FileStatus(status.st_size, status.st_mtime)
        filesystem, path = _object_store(location)
        filesystem.invalidate_cache()
        entry = filesystem.info(path)
        return FileStatus(int(entry["size"]), _modified(entry))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{location}: cannot be looked up ({error})") from error


def remove(location: str) -> None:
    """Removes an object, or a folder with all it holds; absence is no error."""
    try:
        if is_local(location):
            path = local_path(location)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            return
        filesystem, name = _object_store(location)
        filesystem.rm(name, recursive=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"{location}: cannot be removed ({error})") from error


def move(location: str, target: str) -> None:
    """Gives a folder another name beside it, or raises StorageError; `target` must not be there.

    In an object store it is copied, and removed once all of it is.
    """
    if exists(target):
        raise StorageError(f"{target}: there is something; {location} cannot be moved there")
    try:
        if is_local(location):
            local_path(location).rename(local_path(target))
            return
        filesystem, name = _object_store(location)
        filesystem.invalidate_cache()
        _, new_name = _object_store(target)
        for path in filesystem.find(name):
            filesystem.cp_file(path, new_name + path.removeprefix(name))
        filesystem.rm(name, recursive=True)
    except OSError as error:
        raise StorageError(f"{location}: cannot be moved to {target} ({error})") from error


@dataclass
class Draft:
    """A file on its way into a folder: written at `path`, published under `name`."""

    path: Path
    name: str | None


@contextlib.contextmanager
def draft(folder: str, name: str | None = None, durable: bool = False) -> Iterator[Draft]:
    """Yields a draft to write; its file takes its name in the folder when the block succeeds.

    The name may be set within the block, once the content is known. If the block is left by an
    exception, or the draft has no name by then, nothing appears and the scratch file is gone.
    `durable` flushes the bytes to the disk before the name appears.
    """
    target = local_path(folder) if is_local(folder) else None
    written = Draft(Path(), name)
    try:
        with _scratch(target, name or "draft") as written.path:
            yield written
            if written.name is None:
                return
            if target is not None:
                if durable:
                    _flush(written.path)
                written.path.replace(target / written.name)
            else:
                filesystem, path = _object_store(join(folder, written.name))
                filesystem.put_file(str(written.path), path)
    except OSError as error:
        raise StorageError(
            f"{join(folder, written.name or '')}: cannot be written ({error})"
        ) from error


@contextlib.contextmanager
def _scratch(target: Path | None, name: str) -> Iterator[Path]:
    """Yields a hidden file to write, in the target folder or, for an object store, in TMPDIR.

    It is locked as long as this process lives, and has its number, so that one that was killed
    leaves what the next to write in that folder knows for litter, and removes. The lock alone
    does not tell: safetensors writes a new file of the same name, which nobody has locked.
    """
    if target is not None:
        target.mkdir(parents=True, exist_ok=True)
    where = target or Path(tempfile.gettempdir())
    _remove_litter(where)
    while True:
        mine = where / f".{name}.{_HOST}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial"
        mode = 0o600 if target is None else 0o666
        descriptor = os.open(mine, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, mode)
        try:
            with contextlib.suppress(OSError):  # a file system without locks: `compact` tidies up
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if mine.exists():  # else it was taken for litter before it was locked
                yield mine
                return
        finally:
            os.close(descriptor)
            mine.unlink(missing_ok=True)


def _remove_litter(folder: Path) -> None:
    """Removes what killed processes of this machine have left, when first called for a folder."""
    if folder in _tidied:
        return
    _tidied.add(folder)
    with os.scandir(folder) as entries:
        found = [(entry.path, _SCRATCH_OF_HERE.fullmatch(entry.name)) for entry in entries]
    litter = [path for path, match in found if match and not psutil.pid_exists(int(match[1]))]
    for path in litter:
        with contextlib.suppress(OSError):  # gone meanwhile, somebody else's, or in use
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                Path(path).unlink()
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def publish(location: str, durable: bool = False) -> Iterator[Path]:
    """Yields a local scratch path whose file takes the location's name when the block succeeds.

    If the block is left by an exception nothing appears and the scratch file is gone.
    `durable` flushes the bytes to the disk before the name appears.
    """
    folder, slash, name = location.rpartition("/")
    with draft(folder + slash or ".", name, durable) as written:
        yield written.path


def local_copy(location: str, cache: Path) -> Path:
    """Returns a local file with the object's bytes: itself, or a copy under `cache`."""
    if is_local(location):
        return local_path(location)
    copy = cache / location.split("://", 1)[1]
    if not copy.exists():
        with publish(str(copy)) as partial:
            filesystem, path = _object_store(location)
            try:
                filesystem.get_file(path, str(partial))
            except FileNotFoundError as error:
                raise StorageError(f"{location}: no such file") from error
            except OSError as error:
                raise StorageError(f"{location}: cannot be read ({error})") from error
    return copy


def object_store_options(location: str) -> dict[str, str]:
    """Returns deltalake's `storage_options` for a location, from the AWS_* environment."""
    if is_local(location):
        return {}
    options = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    if options.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options["AWS_ALLOW_HTTP"] = "true"
    return options


class _ObjectStore:
    """A file system of fsspec whose every fault is an OSError.

    What boto finds wrong before it asks a server, or with the way to one, is none of its own:
    credentials that are not there, an endpoint that does not answer.
    """

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._filesystem, name)
        if not callable(found):
            return found

        def called(*args: Any, **settings: Any) -> Any:
            try:
                return found(*args, **settings)
            except OSError:
                raise
            except Exception as error:
                if type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore"):
                    raise OSError(f"{type(error).__name__}: {error}") from error
                raise

        return called


def _object_store(location: str) -> tuple[Any, str]:
    """Returns the file system of a URL and the path in it, as `fsspec.core.url_to_fs` does.

    That one would follow the chains of URLs that names may hold, to anywhere.
    """
    try:
        protocol = scheme(location)
        kind = fsspec.get_filesystem_class(protocol)
        filesystem = fsspec.filesystem(protocol, **kind._get_kwargs_from_urls(location))
        return _ObjectStore(filesystem), kind._strip_protocol(location)
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise StorageError(f"{location}: no driver for this kind of URL ({error})") from error


def _object_version(entry: dict[str, Any]) -> str:
    known = ("VersionId", "ETag", "etag", "generation", "LastModified", "mtime")
    return next((str(entry[name]) for name in known if entry.get(name)), "")


def _modified(entry: dict[str, Any]) -> float:
    known = ("LastModified", "last_modified", "updated", "mtime", "created")
    time = next((entry[name] for name in known if entry.get(name)), None)
    if isinstance(time, str):
        time = datetime.fromisoformat(time)
    if isinstance(time, datetime):
        return time.timestamp()
    if isinstance(time, int | float):
        return float(time)
    raise StorageError(f"{entry['name']}: its object store does not say when it was written")


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
