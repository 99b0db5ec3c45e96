"""Karpathy's split files of COCO, Flickr30k and Flickr8k: captions and splits in one JSON.

`dataset_coco.json`, `dataset_flickr30k.json` and `dataset_flickr8k.json`, whose captions are each
sentence's `raw` words. An image's key is its COCO id, or its file's name without the suffix. An
entry that is not what the format says is a `malformed-record`, and costs itself.
"""

from collections.abc import Iterator, Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline import storage
from pipeline.data.sample import Texts
from pipeline.data.sources.base import Record, Reject, SourceConfig, by_key
from pipeline.data.sources.image_files import (
    ImageFile,
    ImageFolders,
    image_key,
    image_name,
    listed,
    read_image,
)
from pipeline.data.sources.readers.json_file import Fields, read_json
from pipeline.data.sources.splits import check_names, folders_of
from pipeline.reason import Reason

_KIND = "one of Karpathy's split files"


class KarpathySourceConfig(SourceConfig):
    """Where the files are, and what the file's splits are called here."""

    type: Literal["karpathy"] = Field(
        description="Karpathy's splits: COCO's, Flickr8k's or Flickr30k's `dataset_*.json`"
    )
    images: str | list[str] = Field(
        description="one folder or several; COCO's `val2014/COCO_….jpg` is looked for in that "
        "subfolder of each, then in the folder itself; a COCO image that is in neither, by the "
        "number it is called by"
    )
    annotations: str = Field(description="the `dataset_*.json` file")
    splits: dict[str, str] = Field(
        default={"restval": "train", "val": "validation"},
        description="new names for the file's splits; one that is not here keeps its name",
    )

    @model_validator(mode="after")
    def _splits_are_names(self) -> Self:
        check_names(*self.splits.values())
        return self

    def build(self) -> "KarpathySource":
        return KarpathySource(self)

    def locations(self) -> dict[str, str]:
        return by_key(images=self.images, annotations=self.annotations)


class KarpathySource:
    """Images and captions of one split file."""

    def __init__(self, config: KarpathySourceConfig) -> None:
        self.config = config
        self._num_entries: dict[str, int] = {}

    def index(self) -> Mapping[str, int]:
        """Returns how many images the file lists."""
        return self._num_entries

    def records(self) -> Iterator[Record | Reject]:
        """Lists the images in the file's order."""
        folders = ImageFolders(*folders_of(self.config.images, ""))
        entries = read_json(storage.absolute(self.config.annotations), _KIND).list("images")
        self._num_entries = {self.config.annotations: len(entries)}
        yield from entries.each(lambda entry: self._record(entry, folders))
        yield from entries.rejects("")

    def read(self, record: Record) -> bytes:
        """Returns the image file's bytes; `record.image` is its location."""
        return read_image(record)

    def _record(self, entry: Fields, folders: ImageFolders) -> Record | Reject:
        name, split = entry.string("filename"), entry.string("split")
        split = self.config.splits.get(split, split)
        try:
            check_names(split)
        except ValueError as error:
            raise entry.wrong("split", str(error)) from error
        image_id = entry.identity("cocoid") if "cocoid" in entry else image_name(name)
        sentences = [sentence.string("raw").strip() for sentence in entry.objects("sentences")]
        captions = tuple(caption for caption in sentences if caption)
        num_empty = len(sentences) - len(captions)
        return listed(
            key=image_key(image_id),
            split=split,
            image=_find(entry, name, folders),
            texts=Texts(image_id, captions),
            detail=f"{num_empty} empty captions dropped" if num_empty else "",
            fault=None if captions else (Reason.NO_CAPTIONS, f"{name}: nothing describes it"),
        )


def _find(entry: Fields, name: str, folders: ImageFolders) -> ImageFile:
    folder = entry.string("filepath") if "filepath" in entry else ""
    for path in (f"{folder}/{name}", name) if folder else (name,):
        image = folders.named(path)
        if image.stamp is not None:
            return image
    if "cocoid" in entry:
        numbered = folders.numbered(entry.identity("cocoid"))
        if numbered.stamp is not None:
            return numbered
    return image
