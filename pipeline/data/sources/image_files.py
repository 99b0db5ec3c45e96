"""Images that lie in folders: found by the names or numbers that annotations call them by.

Videos, DICOM and folders of frames (ZIP) are images here as everywhere in a dataset.

What becomes of an image with its texts is decided here for all sources of this kind: no file is
a `missing-image` reject, a name that is not an image's `unknown-suffix`, one that is not UTF-8
`name-not-utf8`, and a source adds its own reason where nobody has written anything about it. A
link to nothing, a FIFO, a socket and a device are no files.

A name leads to a file below the folders that the recipe names, also with `..` in it or as a whole
location. One that leads elsewhere is a `forbidden-location` reject, and nothing is looked up there:
annotations are written by others. Only tables may name files anywhere, of some schemes.
"""

import os
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

from pipeline import storage
from pipeline.data.sample import Texts, safe_key
from pipeline.data.sources.base import Record, Reject, fingerprint, refused
from pipeline.data.tars.member_names import is_utf8, shown
from pipeline.errors import SourceError, StorageError
from pipeline.reason import Reason

MEDIA = ("mp4", "mov", "webm", "mkv", "zip", "dcm")  # videos, frames in a ZIP, DICOM
SUFFIXES = {
    "jpg": "jpg", "jpeg": "jpg", "jpe": "jpg", "jfif": "jpg", "png": "png", "webp": "webp",
    "gif": "gif", "bmp": "bmp", "tif": "tif", "tiff": "tif", "avif": "avif", "m4v": "mp4",
    **{suffix: suffix for suffix in MEDIA},
}  # fmt: skip

_LAST_NUMBER = re.compile(r"(\d+)$")
_MAX_NUMBER_DIGITS = 19  # of an image's number, as of any of 64 bits
# Names that may lead elsewhere than to the file of that name below a folder.
_TO_BE_FOLLOWED = re.compile(r"(^|/)\.{0,2}(/|$)|://|\0")


class ImageFile(NamedTuple):
    """An image that annotations speak of.

    `stamp` changes when it does; None: there is none, and `absence` says why. `suffix` is the
    image part's; None: it is not named as an image is. `forbidden` says why it may not be read. A
    tuple, because millions are made.
    """

    location: str
    stamp: str | None
    suffix: str | None
    forbidden: str = ""
    absence: str = "no such file"

    @classmethod
    def at(cls, location: str, stamp: str | None, absence: str = "no such file") -> "ImageFile":
        """Returns the file at a location, whose suffix its name says."""
        return cls(location, stamp, SUFFIXES.get(location.rpartition(".")[2].lower()), "", absence)


class ImageFolders:
    """The image files of some folders, from one listing of each; no file is opened."""

    def __init__(self, *folders: str, schemes: Collection[str] = ()) -> None:
        """Lists the folders; raises SourceError if one is absent.

        Files of these schemes (`storage.scheme`) may be named wherever they are.
        """
        self._schemes = schemes
        self._folders = [storage.absolute(folder).rstrip("/") for folder in folders]
        self._stamps: dict[str, dict[str, str]] = {}
        self._by_number: dict[int, ImageFile] | None = None
        for folder in self._folders:
            try:
                self._stamps[folder] = storage.list_stamps(folder)
            except StorageError as error:
                raise SourceError(f"images: {error}") from error

    def __iter__(self) -> Iterator[ImageFile]:
        """Yields every file directly in the folders, images and others, by name."""
        for folder in self._folders:
            for name, stamp in sorted(self._stamps[folder].items()):
                yield ImageFile.at(storage.join(folder, name), stamp)

    def named(self, name: str) -> ImageFile:
        """Returns the first folder's file of this name, which may begin with subfolders."""
        first = None
        for folder in self._folders:
            location, forbidden = self._followed(folder, name)
            stamp = None if forbidden else self._stamp(location)
            if stamp is not None:
                return ImageFile.at(location, stamp)
            first = first or ImageFile.at(location, None)._replace(forbidden=forbidden)
        assert first is not None
        return first

    def _followed(self, folder: str, name: str) -> tuple[str, str]:
        """Returns where a name leads from a folder, and why that may not be looked at."""
        if _TO_BE_FOLLOWED.search(name) is None:
            return f"{folder}/{name}", ""
        if "\0" in name:
            return name, f"{name!r} holds a NUL character"
        location = storage.followed(folder, name)
        below = any(location.startswith(f"{folder}/") for folder in self._folders)
        if below or storage.scheme(location) in self._schemes:
            return location, ""
        return location, f"{name!r} leads out of {folder}; only files below it are read"

    def called(self, name: str) -> ImageFile:
        """Returns the file of this name, or of this name and an image's suffix."""
        exact = self.named(name)
        if exact.stamp is None and exact.suffix is None:
            for suffix in SUFFIXES:
                file = self.named(f"{name}.{suffix}")
                if file.stamp is not None:
                    return file
        return exact

    def numbered(self, identity: int | str) -> ImageFile:
        """Returns the file of an image id, by the number its name ends with.

        So 9 finds `000000000009.jpg`, `COCO_train2014_000000000009.jpg` and `image9.png`. If
        several fit, it is that of the first folder, then the first by name. An id that is not a
        number finds the image of that name.
        """
        if not (str(identity).isdecimal() and len(str(identity)) <= _MAX_NUMBER_DIGITS):
            return self.called(str(identity))
        if self._by_number is None:
            self._by_number = {}
            for file in self:
                number = _LAST_NUMBER.search(image_name(file.location.rpartition("/")[2]))
                if number and file.suffix and len(number[1]) <= _MAX_NUMBER_DIGITS:
                    self._by_number.setdefault(int(number[1]), file)
        absent = storage.join(self._folders[0], f"*{identity:0>12}.jpg")
        return self._by_number.get(int(identity)) or ImageFile.at(absent, None)

    def _stamp(self, location: str) -> str | None:
        folder, _, name = location.rpartition("/")
        folder = folder or "/"
        if folder not in self._stamps:  # a folder that a file name begins with
            try:
                self._stamps[folder] = storage.list_stamps(folder)
            except StorageError:
                if storage.exists(folder):
                    raise
                self._stamps[folder] = {}
        return self._stamps[folder].get(name)


def listed(
    key: str,
    split: str,
    image: ImageFile,
    texts: Texts,
    detail: str = "",
    fault: tuple[Reason, str] | None = None,
    num_entries: int = 1,
) -> Record | Reject:
    """Returns what an image with its texts is listed as.

    `fault` is the source's own reason against it, with a sentence: what the image itself is at
    fault for comes first. `detail` says what was left out of the texts. `num_entries` of the
    source's index went into it.
    """
    location, stamp, suffix, forbidden, absence = image
    if not is_utf8(location):
        location, stamp = shown(location), None
        fault = (Reason.NAME_NOT_UTF8, f"{location}: its name is not UTF-8; rename it")
    elif forbidden:
        fault = (Reason.FORBIDDEN_LOCATION, forbidden)
    elif stamp is None:
        fault = (Reason.MISSING_IMAGE, f"{location}: {absence}")
    elif suffix is None:
        expected = f"expected a name ending in .{', .'.join(SUFFIXES)}"
        fault = (Reason.UNKNOWN_SUFFIX, f"{location.rpartition('/')[2]!r}: {expected}")
    usable = stamp is not None and suffix is not None
    record = Record(
        key=key,
        split=split,
        image=location if usable else "",
        suffix=suffix or "" if usable else "",
        texts=texts.encoded(),
        image_fingerprint=fingerprint(f"{location} {stamp}"),
        detail=detail,
        num_entries=num_entries,
    )
    return record if fault is None else refused(record, *fault)


def read_image(record: Record) -> bytes:
    """Returns the bytes of the file that `record.image` is the location of.

    Raises SourceError if it is gone and StorageError if it cannot be read for another reason.
    """
    location = record.image
    try:
        if storage.is_local(location):
            return _read_file(location.removeprefix("file://"))
        return storage.read_bytes(location)
    except FileNotFoundError as error:
        raise SourceError(f"{location}: vanished since it was listed") from error
    except OSError as error:
        raise StorageError(f"{location}: cannot be read ({error})") from error
    except StorageError as error:
        if storage.exists(location):
            raise
        raise SourceError(f"{location}: vanished since it was listed") from error


def _read_file(path: str) -> bytes:
    """Reads by four calls to the system: a path object, or a file object, cost a third more."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size_bytes = os.fstat(descriptor).st_size
        payload = os.read(descriptor, size_bytes + 1)
        while len(payload) != size_bytes and (more := os.read(descriptor, 1024 * 1024)):
            payload += more  # of a file that grows, or over 2 GiB
        return payload
    finally:
        os.close(descriptor)


def image_key(identity: int | str) -> str:
    """Returns an image's key: COCO's own file names are the id in twelve digits."""
    if isinstance(identity, int) and identity >= 0:
        return safe_key(f"{identity:012d}")
    return safe_key(str(identity))


def image_name(file_name: str) -> str:
    """Returns a file's name without an image's suffix; any other ending belongs to the name."""
    name, dot, suffix = file_name.rpartition(".")
    return name if dot and suffix.lower() in SUFFIXES else file_name
