"""Several sources over one set of images: one sample for each image, with all their texts.

Records are joined by their keys. A COCO id is the same key whichever of the COCO, Karpathy, VQA and
VisDial files it is found in, and so is the name of a Flickr image. For each key:

- the image is that of the first source that has it, stored once; the texts are those of all
  sources, in their order, without those that an earlier source has word for word.
- the split is that of the first source that lists the key. If a later one disagrees, `detail`
  says so: no image is in two splits, whatever is written about it.
- a source that rejects it still gives what it has: one may have the image and another the texts.
  What has no image or no text after that, or is rejected by all for other reasons, is the reject
  of the first source that lists it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, Self

import msgspec
from msgspec.structs import replace
from pydantic import Field

from pipeline.data.sample import Texts
from pipeline.data.sources.base import (
    Record,
    Reject,
    Source,
    SourceConfig,
    accounted,
)
from pipeline.data.sources.coco_captions import CocoCaptionsSourceConfig
from pipeline.data.sources.flickr import FlickrSourceConfig
from pipeline.data.sources.folder import FolderSourceConfig
from pipeline.data.sources.gathering import Gathering
from pipeline.data.sources.karpathy import KarpathySourceConfig
from pipeline.data.sources.shapes import ShapesSourceConfig
from pipeline.data.sources.table import TableSourceConfig
from pipeline.data.sources.visdial import VisdialSourceConfig
from pipeline.data.sources.vqa import VqaSourceConfig
from pipeline.data.sources.webdataset import WebDatasetSourceConfig

SingleSource = (
    ShapesSourceConfig
    | CocoCaptionsSourceConfig
    | KarpathySourceConfig
    | FlickrSourceConfig
    | VqaSourceConfig
    | VisdialSourceConfig
    | TableSourceConfig
    | FolderSourceConfig
    | WebDatasetSourceConfig
)


class MergedSourceConfig(SourceConfig):
    """The sources, that which decides about splits and images first."""

    type: Literal["merged"] = Field(description="several sources of the same images, joined by key")
    sources: list[Annotated[SingleSource, Field(discriminator="type")]] = Field(
        min_length=1, description="the sources, that which decides about splits and images first"
    )

    def build(self) -> "MergedSource":
        return MergedSource(self)

    def leaves_images(self) -> bool:
        return any(source.leaves_images() for source in self.sources)

    def locations(self) -> dict[str, str]:
        return {
            f"sources.{index}.{key}": location
            for index, source in enumerate(self.sources)
            for key, location in source.locations().items()
        }


class MergedSource:
    """The join of several sources, gathered in a scratch file: 24 bytes of memory a record."""

    def __init__(self, config: MergedSourceConfig) -> None:
        self.config = config
        self.sources: list[Source] = [source.build() for source in config.sources]
        self._num_listed: dict[str, int] = {}

    def index(self) -> Mapping[str, int]:
        """Returns how many records and rejects each source has listed."""
        return self._num_listed

    def records(self) -> Iterator[Record | Reject]:
        """Lists the keys in the order of their hashes."""
        with Gathering() as found:
            for index, source in enumerate(self.sources):
                num_listed = 0
                for entry in accounted(source):
                    found.add(entry.key, msgspec.to_builtins(_Listed.of(index, entry)))
                    num_listed += 1
                self._num_listed[f"sources.{index}"] = num_listed
            for key, values in found.groups():
                yield from _merged(key, msgspec.convert(values, list[_Listed]))

    def read(self, record: Record) -> bytes:
        """Returns the image's bytes from the source that listed it."""
        index, _, image = record.image.partition(":")
        return self.sources[int(index)].read(replace(record, image=image))


class _Listed(msgspec.Struct, frozen=True):
    """What one source lists a key as."""

    index: int  # of the source
    record: Record | None  # what it has of a sample
    reject: Reject | None  # why it rejects it, if it does

    @classmethod
    def of(cls, index: int, entry: Record | Reject) -> Self:
        """Returns it of what the source yields."""
        if isinstance(entry, Record):
            return cls(index, replace(entry, num_entries=1), None)
        return cls(index, entry.remains, replace(entry, remains=None, tar=None, num_entries=1))

    @property
    def image(self) -> str:
        """Where the merged source finds the image; "" if there is none."""
        return f"{self.index}:{self.record.image}" if self.record and self.record.image else ""

    @property
    def is_barred(self) -> bool:
        """Whether it has all of a sample and its source still rejects it."""
        return bool(self.reject and self.image and self.record and self.record.texts.num_texts)

    def split(self) -> str:
        """Returns the split that the source lists it for."""
        return self.entry().split

    def texts(self, key: str) -> Texts:
        """Returns what the source has written about it."""
        return self.record.texts.decode() if self.record else Texts(key)

    def entry(self) -> Record | Reject:
        """Returns what the source listed, as the merged source lists it."""
        record = self.record and replace(self.record, image=self.image, num_entries=1)
        if self.reject is not None:
            return replace(self.reject, remains=record)
        assert record is not None
        return record


def _merged(key: str, found: list[_Listed]) -> Iterator[Record | Reject]:
    """Yields the sample of a key, then what a source lists under it for a second time."""
    first_of = {listed.index: listed for listed in reversed(found)}
    joined = sorted(first_of.values(), key=lambda listed: listed.index)
    yield replace(_joined(key, joined), num_entries=len(joined))
    for listed in found:
        if listed is not first_of[listed.index]:
            yield listed.entry()


def _joined(key: str, found: list[_Listed]) -> Record | Reject:
    allowed = [listed for listed in found if not listed.is_barred]
    pictured = next((listed for listed in found if listed.image), None)
    if not allowed or pictured is None or pictured.record is None:
        return found[0].entry()
    texts = pictured.record.texts
    if len(found) > 1:
        texts = _together([listed.texts(key) for listed in found]).encoded()
    if not texts.num_texts:
        return found[0].entry()
    split = allowed[0].split()
    details = [listed.record.detail for listed in found if listed.record and listed.record.detail]
    details += [
        f"sources.{listed.index} lists it for {listed.split()}"
        for listed in allowed
        if listed.split() != split
    ]
    return replace(
        pictured.record,
        split=split,
        image=pictured.image,
        texts=texts,
        detail="; ".join(details),
    )


def _together(all_texts: Sequence[Texts]) -> Texts:
    """Returns all texts, a later source's only where no earlier one has them.

    Within one source repetitions stay: two people may well have written the same.
    """
    together = all_texts[0]
    for texts in all_texts[1:]:
        captions, questions = set(together.captions), set(together.questions)
        dialogs = set(together.dialogs)
        together = Texts(
            together.image_id,
            together.captions + tuple(text for text in texts.captions if text not in captions),
            together.questions + tuple(text for text in texts.questions if text not in questions),
            together.dialogs + tuple(text for text in texts.dialogs if text not in dialogs),
        )
    return together
