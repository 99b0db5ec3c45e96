"""The Flickr30k and Flickr8k format of their authors: a folder of images, a file of captions.

`results_20130124.token` and `Flickr8k.token.txt` have a line for each caption: the image's name,
`#` and a number, a tab, the words. Flickr8k's splits are lists of image names. What becomes of
each image that a caption or a list names:

- its file is there and it has a caption and a split: a sample.
- its file is not there: `missing-image`. Flickr8k's captions name `2258277193_586949ec62.jpg.1`,
  which has never been a file.
- nothing describes it: `no-captions`; with lists, it is in none (92 of Flickr8k's): `no-split`;
  in several: `several-splits`.

A line that is not of this form is a `malformed-record`, and costs itself.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline import storage
from pipeline.data.sample import Texts
from pipeline.data.sources.base import Record, Reject, SourceConfig, by_key, malformed
from pipeline.data.sources.image_files import (
    ImageFolders,
    image_key,
    image_name,
    listed,
    read_image,
)
from pipeline.data.sources.readers.json_file import read_text, shown
from pipeline.data.sources.splits import check_splits, folders_of, hash_split, validation_share
from pipeline.errors import SourceError
from pipeline.reason import Reason


class FlickrSourceConfig(SourceConfig):
    """Where the files are, and how the images are split."""

    type: Literal["flickr"] = Field(description="Flickr8k's and Flickr30k's `.token` file")
    images: str | list[str] = Field(description="one folder or several")
    captions: str = Field(description="the `.token` file")
    splits: dict[str, str] | None = Field(
        default=None, description="a list of image names for each split; null: there are no lists"
    )
    validation_fraction: float | None = validation_share("where there are no lists")

    @model_validator(mode="after")
    def _splits_agree(self) -> Self:
        check_splits("splits", self.splits, self.validation_fraction, {})
        return self

    def build(self) -> "FlickrSource":
        return FlickrSource(self)

    def locations(self) -> dict[str, str]:
        return by_key(images=self.images, captions=self.captions, splits=self.splits)


class FlickrSource:
    """Images and captions of one corpus. Memory: its captions (Flickr30k's are 13 MB)."""

    def __init__(self, config: FlickrSourceConfig) -> None:
        self.config = config

    def index(self) -> Mapping[str, int]:
        """Returns how many lines the file of captions has, empty ones aside."""
        lines = read_text(storage.absolute(self.config.captions)).split("\n")
        return {self.config.captions: sum(not line.isspace() for line in lines if line)}

    def records(self) -> Iterator[Record | Reject]:
        """Lists the images in the order of their captions, then those that only a list names."""
        folders = ImageFolders(*folders_of(self.config.images, ""))
        captions, faults = _captions(storage.absolute(self.config.captions))
        yield from faults
        splits = self._lists()
        for name in dict.fromkeys([*captions, *splits]):
            image_id = image_name(name)
            key = image_key(image_id)
            words = tuple(caption for caption in captions.get(name, ()) if caption)
            num_empty = len(captions.get(name, ())) - len(words)
            fault = None
            split = hash_split(key, self.config.validation_fraction)
            if self.config.splits is not None:
                split, *others = splits.get(name) or ["unlisted"]
                if name not in splits:
                    fault = (Reason.NO_SPLIT, f"{name}: none of the lists in `splits` names it")
                elif others:
                    fault = (
                        Reason.SEVERAL_SPLITS,
                        f"{name}: listed for {split}, {', '.join(others)}",
                    )
            if not words:
                fault = (Reason.NO_CAPTIONS, f"{name}: nothing describes it")
            yield listed(
                key=key,
                split=split,
                image=folders.named(name),
                texts=Texts(image_id, words),
                detail=f"{num_empty} empty captions dropped" if num_empty else "",
                fault=fault,
                num_entries=len(captions.get(name, ())),
            )

    def read(self, record: Record) -> bytes:
        """Returns the image file's bytes; `record.image` is its location."""
        return read_image(record)

    def _lists(self) -> dict[str, list[str]]:
        """Returns the splits of each image name that a list has."""
        splits: defaultdict[str, list[str]] = defaultdict(list)
        for split, location in (self.config.splits or {}).items():
            names = read_text(storage.absolute(location)).split("\n")
            for name in dict.fromkeys(name.strip() for name in names):
                if name:
                    splits[name].append(split)
        return splits


def _captions(location: str) -> tuple[dict[str, list[str]], list[Reject]]:
    """Returns the captions of each image, and the lines that are none.

    Raises SourceError if no line is one.
    """
    captions: defaultdict[str, list[str]] = defaultdict(list)
    faults = []
    for number, line in enumerate(read_text(location).split("\n"), 1):
        if not line.strip():
            continue
        label, tab, caption = line.partition("\t")
        name, sign, order = label.rpartition("#")
        if tab and sign and name.strip() and order.strip().isdecimal():
            captions[name.strip()].append(caption.strip())
            continue
        where = f"{location}: line {number}"
        expected = "expected an image's name, '#' and a number, a tab and a caption"
        faults.append(malformed(where, "", f"{where}: {expected}, found {shown(line.strip())}"))
    if faults and not captions:
        raise SourceError(f"{faults[0].detail}. Is it a Flickr .token file?")
    return captions, faults
