"""The COCO captions format: a folder of images, and JSON with `images` and `annotations`.

Official files of 2014 and 2017 and any file of that shape. What becomes of each image record:

- its file is there and a caption is left: a sample. Empty captions, and annotations that repeat
  another's id and words, are dropped and counted in the sample's `detail`.
- its file is not there: a `missing-image` reject; its name is not an image's: `unknown-suffix`.
- it has no caption: `no-captions`; none with a word in it: `empty-captions`.
- captions that name an image which `images` does not list: one `unknown-image` reject per image.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pipeline import storage
from pipeline.data.sample import Texts, safe_key
from pipeline.data.sources.base import (
    Record,
    Reject,
    SourceConfig,
    by_key,
    fingerprint,
    in_validation,
)
from pipeline.errors import SourceError, StorageError

SUFFIXES = {
    "jpg": "jpg", "jpeg": "jpg", "png": "png", "webp": "webp", "gif": "gif", "bmp": "bmp",
    "tif": "tif", "tiff": "tif",
}  # fmt: skip
_DEFAULT_VALIDATION_FRACTION = 0.1

ImageId = int | str


class CocoCaptionsSourceConfig(SourceConfig):
    """Where the files are, and how the images of a single file are split."""

    type: Literal["coco-captions"]
    images: str | dict[str, str]  # a folder, or a folder for each split
    annotations: str | dict[str, str]  # one file, or a file for each split
    # With one file: the share of images whose key's hash puts them into `validation`; 0.1 if null.
    validation_fraction: float | None = Field(default=None, ge=0, lt=1)

    @model_validator(mode="after")
    def _splits_agree(self) -> Self:
        if isinstance(self.annotations, str):
            if not isinstance(self.images, str):
                raise ValueError(
                    "images has a folder for each split but annotations is one file; "
                    "give annotations a file for each split as well, or images one folder"
                )
            return self
        if self.validation_fraction is not None:
            raise ValueError(
                "validation_fraction splits a single annotation file, but annotations has a "
                "file for each split; leave one of them out"
            )
        if not self.annotations:
            raise ValueError("annotations names no file")
        for split in self.annotations:
            if safe_key(split) != split:
                raise ValueError(f"split {split!r}: only ASCII letters, digits, '_' and '-'")
        if isinstance(self.images, dict) and set(self.images) != set(self.annotations):
            raise ValueError(
                f"images has the splits {sorted(self.images)}, annotations has "
                f"{sorted(self.annotations)}; they must be the same"
            )
        return self

    def build(self) -> "CocoCaptionsSource":
        return CocoCaptionsSource(self)

    def locations(self) -> dict[str, str]:
        return by_key(images=self.images, annotations=self.annotations)


@dataclass
class CocoCaptionsSource:
    """Images and captions of one or more COCO files. Every caption of an image is kept."""

    config: CocoCaptionsSourceConfig

    def records(self) -> Iterator[Record | Reject]:
        """Lists the images of every file in its order, then the images that only captions name."""
        annotations = self.config.annotations
        files = {"": annotations} if isinstance(annotations, str) else annotations
        folders = _Folders()
        for split, location in files.items():
            yield from self._file(storage.absolute(location), split, folders)

    def read(self, record: Record) -> bytes:
        """Returns the image file's bytes; `record.image` is its location."""
        try:
            return storage.read_bytes(record.image)
        except StorageError as error:
            if storage.exists(record.image):
                raise
            raise SourceError(f"{record.image}: vanished since it was listed") from error

    def _file(self, location: str, split: str, folders: "_Folders") -> Iterator[Record | Reject]:
        images = self.config.images
        folder = storage.absolute(images if isinstance(images, str) else images[split]).rstrip("/")
        folders.add(folder)
        document = _load(location)
        captions = _captions(document["annotations"], location)
        listed = set()
        for index, entry in enumerate(document["images"]):
            where = f"{location}: images[{index}]"
            image_id = _identity(entry, "id", where)
            name = _string(entry, "file_name", where)
            listed.add(image_id)
            yield self._record(image_id, folder, name, captions[image_id], split, folders)
        for image_id, orphans in captions.items():
            if image_id not in listed:
                key = _key(image_id)
                yield Reject(
                    key=key,
                    split=split or self._split(key),
                    reason="unknown-image",
                    detail=f"{orphans.num_listed} captions name image {image_id!r}, which "
                    f"{location} does not list",
                    fingerprint=fingerprint("", orphans.texts(image_id)),
                )

    def _record(
        self,
        image_id: ImageId,
        folder: str,
        name: str,
        captions: "_Captions",
        split: str,
        folders: "_Folders",
    ) -> Record | Reject:
        key = _key(image_id)
        split = split or self._split(key)
        image = storage.join(folder, name)
        stamp = folders.stamp(image)
        texts = captions.texts(image_id)
        identity = fingerprint(f"{image} {stamp}", texts)
        suffix = SUFFIXES.get(name.rpartition(".")[2].lower())
        if stamp is None:
            return Reject(key, split, "missing-image", f"{image}: no such file", identity)
        if suffix is None:
            detail = f"{name!r}: expected a name ending in .{', .'.join(SUFFIXES)}"
            return Reject(key, split, "unknown-suffix", detail, identity)
        if not captions.num_listed:
            return Reject(key, split, "no-captions", f"{name}: nothing describes it", identity)
        if not texts.captions:
            detail = f"{name}: its {captions.num_listed} captions are empty"
            return Reject(key, split, "empty-captions", detail, identity)
        return Record(key, split, image, suffix, texts, identity, captions.dropped())

    def _split(self, key: str) -> str:
        fraction = self.config.validation_fraction
        fraction = _DEFAULT_VALIDATION_FRACTION if fraction is None else fraction
        return "validation" if in_validation(key, fraction) else "train"


class _Captions:
    """The captions of one image as they are found, without empty and repeated ones."""

    def __init__(self) -> None:
        self._kept: dict[tuple[ImageId, str], str] = {}  # by annotation id and words
        self.num_listed = 0
        self._num_empty = 0

    def add(self, annotation_id: ImageId, caption: str) -> None:
        self.num_listed += 1
        if caption:
            self._kept[annotation_id, caption] = caption
        else:
            self._num_empty += 1

    def texts(self, image_id: ImageId) -> Texts:
        return Texts(image_id, captions=tuple(self._kept.values()))

    def dropped(self) -> str:
        """Says what was left out, or nothing."""
        repeated = self.num_listed - self._num_empty - len(self._kept)
        counts = {"empty": self._num_empty, "repeated": repeated}
        return ", ".join(
            f"{count} {kind} captions dropped" for kind, count in counts.items() if count
        )


class _Folders:
    """The stamps of image files, from one listing of each folder that a file name is in."""

    def __init__(self) -> None:
        self._stamps: dict[str, dict[str, str]] = {}

    def add(self, folder: str) -> None:
        """Lists a folder of images; raises SourceError if there is none."""
        try:
            self._stamps[folder] = storage.list_stamps(folder)
        except StorageError as error:
            raise SourceError(f"images: {error}") from error

    def stamp(self, image: str) -> str | None:
        """Returns what changes when the file does, or None if there is no such file."""
        folder, _, name = image.rpartition("/")
        if folder not in self._stamps:  # a folder that a file name begins with
            try:
                self._stamps[folder] = storage.list_stamps(folder)
            except StorageError:
                if storage.exists(folder):
                    raise
                self._stamps[folder] = {}
        return self._stamps[folder].get(name)


def _load(location: str) -> dict[str, list[Any]]:
    try:
        document = json.loads(storage.read_bytes(location))
    except ValueError as error:
        raise SourceError(f"{location}: not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise SourceError(
            f"{location}: expected an object with the lists 'images' and 'annotations', found a "
            f"{type(document).__name__}"
        )
    for name in ("images", "annotations"):
        if not isinstance(document.get(name), list):
            raise SourceError(
                f"{location}: expected a list {name!r}; the file has the keys "
                f"{', '.join(map(repr, document)) or 'none'}. Is it a COCO captions file?"
            )
    return document


def _captions(annotations: list[Any], location: str) -> Mapping[ImageId, _Captions]:
    """Gathers the captions of each image; an image without any gets an empty entry when asked."""
    captions: defaultdict[ImageId, _Captions] = defaultdict(_Captions)
    for index, annotation in enumerate(annotations):
        where = f"{location}: annotations[{index}]"
        image_id = _identity(annotation, "image_id", where)
        annotation_id = _identity(annotation, "id", where)
        if annotation.get("caption", "") is None:
            annotation = {**annotation, "caption": ""}
        caption = _string(annotation, "caption", where).strip()
        captions[image_id].add(annotation_id, caption)
    return captions


def _key(image_id: ImageId) -> str:
    """COCO's own file names are the id in twelve digits, whichever file it is found in."""
    if isinstance(image_id, int) and image_id >= 0:
        return f"{image_id:012d}"
    return safe_key(str(image_id))


def _identity(entry: Any, name: str, where: str) -> ImageId:
    value = _field(entry, name, where)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise SourceError(f"{where}: {name!r}: expected a number or a string, found {value!r}")
    return value


def _string(entry: Any, name: str, where: str) -> str:
    value = _field(entry, name, where)
    if not isinstance(value, str):
        raise SourceError(f"{where}: {name!r}: expected a string, found {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise SourceError(f"{where}: {name!r}: {value!r} holds half a surrogate pair") from error
    return value


def _field(entry: Any, name: str, where: str) -> Any:
    if not isinstance(entry, dict):
        raise SourceError(f"{where}: expected an object, found {entry!r}")
    if name not in entry:
        raise SourceError(
            f"{where}: expected a field {name!r}, found {', '.join(map(repr, entry)) or 'none'}. "
            "Is it a COCO captions file?"
        )
    return entry[name]
