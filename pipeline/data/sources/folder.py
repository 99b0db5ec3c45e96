"""A folder of images with text files of the same name beside them, subfolders included.

`a/dog.jpg` is described by `a/dog.txt`, each line a caption, or by `a/dog.json`, an object whose
fields the recipe maps (by default `captions`, `questions` and `dialogs`), or by both. The key is
the path without the suffix. What becomes of each file:

- an image with a text: a sample. An image without one: `no-texts`.
- a text file without an image: `missing-image`. JSON that is not what the recipe says, or text
  that is not UTF-8: `malformed-texts`.
- two images of one name, such as `dog.jpg` and `dog.png`: the second is a `duplicate-id`.
- any other file: `unknown-suffix`, but for those whose name begins with a dot.

A subfolder with a text beside it that has its name is one sample, a video: the images in it are its
frames in the order of their names, and are stored as a ZIP that holds their bytes as they are.
"""

import io
import json
import zipfile
from collections.abc import Iterator
from typing import Literal, Self

import xxhash
from pydantic import Field, model_validator

from pipeline import storage
from pipeline.data.sample import Texts, safe_key
from pipeline.data.sources.base import Record, Reject, SourceConfig, by_key
from pipeline.data.sources.image_files import ImageFile, listed, read_image
from pipeline.data.sources.json_file import read_text
from pipeline.data.sources.splits import check_splits, hash_split
from pipeline.data.sources.text_columns import TextColumns, gathered, json_object
from pipeline.errors import PipelineError, SourceError, StorageError

_TEXT_SUFFIXES = ("txt", "json")


class FolderSourceConfig(SourceConfig):
    """Where the folder is, and what its JSON files hold."""

    type: Literal["folder"]
    folder: str | dict[str, str]  # one, or one for each split
    texts: TextColumns = TextColumns(captions="captions", questions="questions", dialogs="dialogs")
    # Of a single folder: the share of images whose key's hash puts them into `validation`; 0.1
    # if null.
    validation_fraction: float | None = Field(default=None, ge=0, lt=1)

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        check_splits("folder", self.folder, self.validation_fraction, {})
        self.texts.check()
        return self

    def build(self) -> "FolderSource":
        return FolderSource(self)

    def locations(self) -> dict[str, str]:
        return by_key(folder=self.folder)


class FolderSource:
    """Images and the texts beside them. Memory: the listing of one subfolder at a time."""

    def __init__(self, config: FolderSourceConfig) -> None:
        self.config = config

    def records(self) -> Iterator[Record | Reject]:
        """Lists the files of each folder by name, then its subfolders."""
        folder = self.config.folder
        for split, location in ({"": folder} if isinstance(folder, str) else folder).items():
            root = storage.absolute(location).rstrip("/")
            if not storage.exists(root):
                raise SourceError(f"folder: {root}: no such folder")
            yield from self._folder(root, "", split)

    def read(self, record: Record) -> bytes:
        """Returns the image file's bytes, or a ZIP of a folder's; `record.image` is where."""
        return _zipped(record) if record.image.endswith("/") else read_image(record)

    def _folder(self, folder: str, path: str, split: str) -> Iterator[Record | Reject]:
        stamps = storage.list_stamps(folder)
        names = [name for name in storage.list_names(folder) if not name.startswith(".")]
        images: dict[str, list[ImageFile]] = {}
        texts: dict[str, list[str]] = {}
        for name in names:
            stem, _, suffix = name.rpartition(".")
            file = ImageFile.at(storage.join(folder, name), stamps.get(name))
            if name in stamps and suffix.lower() in _TEXT_SUFFIXES and stem:
                texts.setdefault(stem, []).append(file.location)
            elif name in stamps:
                images.setdefault(stem if file.suffix else name, []).append(file)
        videos = [name for name in names if name not in stamps and name in texts]
        for name in videos:
            frames = storage.list_stamps(storage.join(folder, name))
            stamp = xxhash.xxh3_64_hexdigest(json.dumps(frames, sort_keys=True).encode())
            video = ImageFile(f"{storage.join(folder, name)}/", stamp, "zip")
            images.setdefault(name, []).append(video)
        for stem in sorted({*images, *texts}):
            absent = ImageFile.at(storage.join(folder, f"{stem}.jpg"), None)
            for image in images.get(stem, [absent]):
                yield self._record(f"{path}{stem}", image, texts.get(stem, []), split)
        for name in names:
            if name not in stamps and name not in videos:
                yield from self._folder(storage.join(folder, name), f"{path}{name}/", split)

    def _record(self, path: str, image: ImageFile, files: list[str], split: str) -> Record | Reject:
        key = safe_key(path)
        texts, fault = Texts(path), ("no-texts", f"{path}: no .txt or .json beside it says a word")
        try:
            texts = gathered([Texts(path), *(self._texts(file, path) for file in files)])
        except (SourceError, ValueError) as error:
            fault = ("malformed-texts", str(error))
        return listed(
            key=key,
            split=split or hash_split(key, self.config.validation_fraction),
            image=image,
            texts=texts,
            fault=None if texts.num_texts else fault,
        )

    def _texts(self, file: str, path: str) -> Texts:
        text = read_text(file)
        if file.endswith(".txt"):
            return Texts(path, tuple(line.strip() for line in text.split("\n") if line.strip()))
        try:
            return self.config.texts.texts(json_object(text), path)
        except (ValueError, PipelineError) as error:
            raise SourceError(f"{file}: {error}") from error


def _zipped(record: Record) -> bytes:
    """Returns a ZIP of the images in a folder: the same files make the same bytes."""
    folder = record.image.rstrip("/")
    packed = io.BytesIO()
    try:
        names = sorted(name for name in storage.list_stamps(folder) if not name.startswith("."))
        with zipfile.ZipFile(packed, "w") as archive:  # stored: they are compressed already
            for name in names:
                archive.writestr(zipfile.ZipInfo(name), storage.read_bytes(f"{folder}/{name}"))
    except StorageError as error:
        raise SourceError(f"{folder}: its frames cannot be read: {error}") from error
    return packed.getvalue()
