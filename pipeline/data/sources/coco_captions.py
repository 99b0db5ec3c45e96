"""The COCO captions format: a folder of images, and JSON with `images` and `annotations`.

Official files of 2014 and 2017 and any file of that shape. What becomes of each image record:

- its file is there and a caption is left: a sample. Empty captions, and annotations that repeat
  another's id and words, are dropped and counted in the sample's `detail`.
- its file is not there: a `missing-image` reject; its name is not an image's: `unknown-suffix`.
- it has no caption: `no-captions`; none with a word in it: `empty-captions`.
- captions that name an image which `images` does not list: one `unknown-image` reject per image.

An image or a caption that is not what the format says is a `malformed-record`, and costs itself.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, Self

import msgspec
from pydantic import Field, model_validator

from pipeline import storage
from pipeline.data.sample import Texts
from pipeline.data.sources.base import (
    Record,
    Reject,
    SourceConfig,
    by_key,
    fingerprint,
    refused,
)
from pipeline.data.sources.image_files import ImageFolders, image_key, listed, read_image
from pipeline.data.sources.readers.json_file import Fields, Groups, Identity, read_json
from pipeline.data.sources.splits import check_splits, folders_of, hash_split, validation_share
from pipeline.reason import Reason

_KIND = "a COCO captions file"


class CocoCaptionsSourceConfig(SourceConfig):
    """Where the files are, and how the images of a single file are split."""

    type: Literal["coco-captions"] = Field(description="COCO's caption files")
    images: str | dict[str, str] = Field(description="a folder, or a folder for each split")
    annotations: str | dict[str, str] = Field(description="one file, or a file for each split")
    validation_fraction: float | None = validation_share("of a single file")

    @model_validator(mode="after")
    def _splits_agree(self) -> Self:
        beside = {"images": self.images}
        check_splits("annotations", self.annotations, self.validation_fraction, beside)
        return self

    def build(self) -> "CocoCaptionsSource":
        return CocoCaptionsSource(self)

    def locations(self) -> dict[str, str]:
        return by_key(images=self.images, annotations=self.annotations)


class CocoCaptionsSource:
    """Images and captions of one or more COCO files. Every caption of an image is kept."""

    def __init__(self, config: CocoCaptionsSourceConfig) -> None:
        self.config = config
        self._num_entries: dict[str, int] = {}

    def index(self) -> Mapping[str, int]:
        """Returns how many images and annotations each file lists."""
        return self._num_entries

    def records(self) -> Iterator[Record | Reject]:
        """Lists the images of every file in its order, then the images that only captions name."""
        annotations = self.config.annotations
        files = {"": annotations} if isinstance(annotations, str) else annotations
        self._num_entries = {}
        for split, location in files.items():
            yield from self._file(storage.absolute(location), split)

    def read(self, record: Record) -> bytes:
        """Returns the image file's bytes; `record.image` is its location."""
        return read_image(record)

    def _file(self, location: str, split: str) -> Iterator[Record | Reject]:
        folder = ImageFolders(*folders_of(self.config.images, split))
        document = read_json(location, _KIND)
        images, annotations = document.list("images"), document.list("annotations")
        self._num_entries[f"{split} {location}".lstrip()] = len(images) + len(annotations)
        image_at = images.reader(_Image, _Image.checked)
        caption_at = annotations.reader(_Caption, _Caption.checked)
        captions = Groups(annotations, "image_id")
        known: set[Identity] = set()
        for image in images.made(image_at, range(len(images))):
            is_first = image.id not in known
            known.add(image.id)
            places = captions.places(image.id)
            found = _Captions(image.id, annotations.made(caption_at, places))
            yield listed(
                key=(key := image_key(image.id)),
                split=split or hash_split(key, self.config.validation_fraction),
                image=folder.named(image.file_name),
                texts=found.texts,
                detail=found.dropped,
                fault=found.fault,
                num_entries=1 + found.num_listed if is_first else 1,
            )
        for image_id, entries in captions.beside(known):
            usable = [*annotations.checked(_Caption.checked, entries)]
            yield self._orphan(image_id, usable, location, split)
        yield from images.rejects(split)
        yield from annotations.rejects(split)

    def _orphan(
        self, image_id: Identity, captions: list["_Caption"], location: str, split: str
    ) -> Reject:
        key = image_key(image_id)
        texts = _Captions(image_id, captions).texts.encoded()
        split = split or hash_split(key, self.config.validation_fraction)
        remains = Record(key, split, "", "", texts, fingerprint(""), num_entries=len(captions))
        detail = f"{len(captions)} captions name image {image_id!r}, which {location} does not list"
        return refused(remains, Reason.UNKNOWN_IMAGE, detail)


class _Image(msgspec.Struct):
    id: Identity
    file_name: str

    @classmethod
    def checked(cls, image: Fields) -> Self:
        return cls(image.identity("id"), image.string("file_name"))


class _Caption(msgspec.Struct):
    id: Identity
    image_id: Identity
    caption: str | None

    @classmethod
    def checked(cls, annotation: Fields) -> Self:
        words = None if annotation.get("caption") is None else annotation.string("caption")
        return cls(annotation.identity("id"), annotation.identity("image_id"), words)


class _Captions:
    """The captions of one image, without empty and repeated ones and those of other images."""

    def __init__(self, image_id: Identity, annotations: Iterable[_Caption]) -> None:
        words = [
            (annotation.id, (annotation.caption or "").strip())
            for annotation in annotations
            if annotation.image_id == image_id
        ]
        kept = dict.fromkeys(entry for entry in words if entry[1])
        self.num_listed = len(words)
        self._num_empty = sum(not caption for _, caption in words)
        self.texts = Texts(image_id, captions=tuple(caption for _, caption in kept))

    @property
    def fault(self) -> tuple[Reason, str] | None:
        """Why there is nothing to keep, or None."""
        if self.texts.captions:
            return None
        if not self.num_listed:
            return Reason.NO_CAPTIONS, f"image {self.texts.image_id!r}: nothing describes it"
        detail = f"image {self.texts.image_id!r}: its {self.num_listed} captions are empty"
        return Reason.EMPTY_CAPTIONS, detail

    @property
    def dropped(self) -> str:
        """Says what was left out, or nothing."""
        if self.num_listed == len(self.texts.captions):
            return ""
        repeated = self.num_listed - self._num_empty - len(self.texts.captions)
        counts = {"empty": self._num_empty, "repeated": repeated}
        return ", ".join(
            f"{count} {kind} captions dropped" for kind, count in counts.items() if count
        )
