"""A folder of images with text files of the same name beside them, subfolders included.

`a/dog.jpg` is described by `a/dog.txt`, each line a caption, or by `a/dog.json`, an object whose
fields the recipe maps (by default `captions`, `questions` and `dialogs`), or by both. The key is
the path without the suffix. What becomes of each file:

- an image with a text: a sample. An image without one: `no-texts`.
- a text file without an image: `missing-image`. JSON that is not what the recipe says, or text
  that is not UTF-8: `malformed-texts`. Suffixes are in small or capital letters.
- a link to nothing, a FIFO, a socket or a device in place of an image: `missing-image`; in place
  of a text: `malformed-texts`. A link to a folder that it lies in: `link-loop`.
- a file whose name is not UTF-8: `name-not-utf8`. A key of an object store with two slashes in a
  row: `unnamed-folder`, one for all of them.
- two images of one name, such as `dog.jpg` and `dog.png`: the second is a `duplicate-id`.
- any other file: `unknown-suffix`, but for those whose name begins with a dot, and what Windows and
  the Finder leave: `Thumbs.db`, `desktop.ini`, `Icon`.

A subfolder with a text beside it that has its name is one sample, a video: the images in it are its
frames in the order of their names, and are stored as a ZIP that holds their bytes as they are.
Subfolders of it are listed as others. A dataset of this project that lies in the folder is no part
of it.
"""

import io
import json
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Self

import xxhash
from pydantic import Field, model_validator

from pipeline import storage
from pipeline.data.sample import Texts, safe_key
from pipeline.data.sources.base import (
    Record,
    Reject,
    SourceConfig,
    by_key,
    without_texts,
)
from pipeline.data.sources.image_files import ImageFile, listed, read_image
from pipeline.data.sources.readers.json_file import read_text
from pipeline.data.sources.readers.text_columns import TextColumns, gathered, json_object
from pipeline.data.sources.splits import check_splits, hash_split, validation_share
from pipeline.data.tars.member_names import is_hidden, shown
from pipeline.errors import PipelineError, SourceError, StorageError
from pipeline.reason import Reason

_TEXT_SUFFIXES = ("txt", "json")


class FolderSourceConfig(SourceConfig):
    """Where the folder is, and what its JSON files hold."""

    type: Literal["folder"] = Field(
        description="a folder of images, each with a JSON or text file beside it"
    )
    folder: str | dict[str, str] = Field(description="the folder, or one for each split")
    texts: TextColumns = Field(
        default=TextColumns(captions="captions", questions="questions", dialogs="dialogs"),
        description="where the JSON files hold texts",
    )
    validation_fraction: float | None = validation_share("of a single folder")

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        check_splits("folder", self.folder, self.validation_fraction, {})
        self.texts.check()
        return self

    def build(self) -> "FolderSource":
        return FolderSource(self)

    def locations(self) -> dict[str, str]:
        return by_key(folder=self.folder)


class _Folder(NamedTuple):
    """A folder that is still to be listed, the files in it only if it is no video."""

    location: str
    path: str  # below the root, with a slash at its end
    above: frozenset[tuple[int, int] | None]  # the identities of the folders that it lies in
    is_video: bool


class _TextFile(NamedTuple):
    """A file of texts. `suffix` is in small letters; `fault` says what it is if it is no file."""

    location: str
    suffix: str
    fault: str


class FolderSource:
    """Images and the texts beside them. Memory: the listing of one subfolder at a time."""

    def __init__(self, config: FolderSourceConfig) -> None:
        self.config = config
        self._num_files: dict[str, int] = {}  # by folder of the recipe, as the folders list them

    def index(self) -> Mapping[str, int]:
        """Returns how many files each folder has, hidden ones and datasets aside."""
        return self._num_files

    def records(self) -> Iterator[Record | Reject]:
        """Lists the files of each folder by name, then its subfolders."""
        folder = self.config.folder
        for split, location in ({"": folder} if isinstance(folder, str) else folder).items():
            root = storage.absolute(location).rstrip("/")
            if not storage.exists(root):
                raise SourceError(f"folder: {root}: no such folder")
            self._num_files[root] = 0
            yield from self._tree(root, split)

    def read(self, record: Record) -> bytes:
        """Returns the image file's bytes, or a ZIP of a folder's; `record.image` is where."""
        return _zipped(record) if record.image.endswith("/") else read_image(record)

    def _tree(self, root: str, split: str) -> Iterator[Record | Reject]:
        """Lists a folder, then its subfolders; a link into one that it lies in is not followed."""
        pending = [_Folder(root, "", frozenset(), is_video=False)]
        while pending:
            folder, path, above, is_video = pending.pop()
            identity = storage.folder_identity(folder)
            if identity is not None and identity in above:
                self._num_files[root] += 1
                detail = f"{shown(folder)}: a link to a folder that it lies in"
                yield _unread(path.rstrip("/"), split, Reason.LINK_LOOP, detail)
                continue
            entries = storage.list_entries(folder)
            if _is_dataset(folder, entries):
                continue
            visible = [entry for entry in entries if not is_hidden(entry.name)]
            self._num_files[root] += sum(entry.kind != "folder" for entry in visible)
            described: set[str] = set()
            if not is_video:  # what is beside the frames of one describes nothing
                described = self._videos(folder, visible, above | {identity})
                yield from self._files(folder, path, visible, described, split)
            pending += [
                _Folder(
                    storage.join(folder, entry.name),
                    f"{path}{entry.name}/",
                    above | {identity},
                    entry.name in described,
                )
                for entry in reversed(visible)
                if entry.kind == "folder"
            ]

    def _videos(
        self,
        folder: str,
        entries: Sequence[storage.Entry],
        above: frozenset[tuple[int, int] | None],
    ) -> set[str]:
        """Returns the subfolders with a text beside them, but for those that lead back up."""
        described = {stem for stem, suffix in map(_parts, entries) if suffix in _TEXT_SUFFIXES}
        found = {entry.name for entry in entries if entry.kind == "folder"} & described
        return {
            name
            for name in found
            if (identity := storage.folder_identity(storage.join(folder, name))) is None
            or identity not in above
        }

    def _files(
        self,
        folder: str,
        path: str,
        entries: Sequence[storage.Entry],
        videos: Collection[str],
        split: str,
    ) -> Iterator[Record | Reject]:
        """Lists the files directly in a folder, and the subfolders that are videos."""
        images: dict[str, list[ImageFile]] = {}
        texts: dict[str, list[_TextFile]] = {}
        num_frames: dict[str, int] = {}  # of each video
        for entry in entries:
            stem, suffix = _parts(entry)
            location = storage.join(folder, entry.name)
            if not entry.name:
                detail = f"{folder}: {entry.fault}, which cannot be read"
                yield _unread(f"{path}unnamed", split, Reason.UNNAMED_FOLDER, detail)
            elif entry.kind == "folder":
                continue
            elif suffix in _TEXT_SUFFIXES:
                texts.setdefault(stem, []).append(_TextFile(location, suffix, entry.fault))
            else:
                stamp = entry.stamp if entry.kind == "file" else None
                file = ImageFile.at(location, stamp, f"it is {entry.fault}, not a file")
                images.setdefault(stem if file.suffix else entry.name, []).append(file)
        for entry in entries:
            if entry.kind == "folder" and entry.name in videos:
                location = f"{storage.join(folder, entry.name)}/"
                inside = storage.list_entries(location)
                frames = {e.name: e.stamp for e in inside if e.kind == "file"}
                stamp = xxhash.xxh3_64_hexdigest(json.dumps(frames, sort_keys=True).encode())
                images.setdefault(entry.name, []).append(ImageFile(location, stamp, "zip"))
                num_frames[location] = sum(
                    e.kind != "folder" and not is_hidden(e.name) for e in inside
                )
        for stem in sorted({*images, *texts}):
            absent = ImageFile.at(storage.join(folder, f"{stem}.jpg"), None)
            found, beside = images.get(stem, []), texts.get(stem, [])
            for index, image in enumerate(found or [absent]):
                num_files = num_frames.get(image.location, 1) if found else 0
                num_files += len(beside) if index == 0 else 0
                yield self._record(f"{path}{stem}", image, beside, split, num_files)

    def _record(
        self, path: str, image: ImageFile, files: Sequence[_TextFile], split: str, num_files: int
    ) -> Record | Reject:
        path = shown(path)
        key = safe_key(path)
        texts, fault = (
            Texts(path),
            (Reason.NO_TEXTS, f"{path}: no .txt or .json beside it says a word"),
        )
        try:
            texts = gathered([Texts(path), *(self._texts(file, path) for file in files)])
        except (SourceError, ValueError) as error:
            fault = (Reason.MALFORMED_TEXTS, shown(str(error)))
        return listed(
            key=key,
            split=split or hash_split(key, self.config.validation_fraction),
            image=image,
            texts=texts,
            fault=None if texts.num_texts else fault,
            num_entries=num_files,
        )

    def _texts(self, file: _TextFile, path: str) -> Texts:
        if file.fault:
            raise SourceError(f"{file.location}: it is {file.fault}, not a file")
        text = read_text(file.location)
        if file.suffix == "txt":
            return Texts(path, tuple(line.strip() for line in text.split("\n") if line.strip()))
        try:
            return self.config.texts.texts(json_object(text), path)
        except (ValueError, PipelineError) as error:
            raise SourceError(f"{file.location}: {error}") from error


def _parts(entry: storage.Entry) -> tuple[str, str]:
    """Returns a name's stem, and its suffix in small letters; "" of a folder or without a stem."""
    stem, _, suffix = entry.name.rpartition(".")
    return stem, suffix.lower() if stem and entry.kind != "folder" else ""


def _unread(path: str, split: str, reason: Reason, detail: str) -> Reject:
    """Returns the reject of what is in a folder and cannot even be listed."""
    path = shown(path)
    key = safe_key(path)
    return without_texts(Texts(path), key, split or "train", reason, detail, image=reason)


def _is_dataset(folder: str, entries: Sequence[storage.Entry]) -> bool:
    is_likely = any(entry.name == "manifest" and entry.kind == "folder" for entry in entries)
    return is_likely and storage.exists(storage.join(folder, "manifest", "samples", "_delta_log"))


def _zipped(record: Record) -> bytes:
    """Returns a ZIP of the images in a folder: the same files make the same bytes."""
    folder = record.image.rstrip("/")
    packed = io.BytesIO()
    try:
        entries = [e for e in storage.list_entries(folder) if not is_hidden(e.name)]
        faulty = next((entry for entry in entries if entry.kind == "other"), None)
        if faulty is not None:
            raise SourceError(f"{folder}/{shown(faulty.name)}: it is {faulty.fault}, no frame")
        names = [entry.name for entry in entries if entry.kind == "file"]
        with zipfile.ZipFile(packed, "w") as archive:  # stored: they are compressed already
            for name in names:
                archive.writestr(zipfile.ZipInfo(name), storage.read_bytes(f"{folder}/{name}"))
    except StorageError as error:
        raise SourceError(f"{folder}: its frames cannot be read: {error}") from error
    return packed.getvalue()
