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
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec.structs import replace
from pydantic import Field

from pipeline.data.sample import Texts
from pipeline.data.sources.base import (
    Record,
    Reject,
    Source,
    SourceConfig,
    accounted,
    with_texts,
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
                    found.add(entry.key, _packed(index, entry))
                    num_listed += 1
                self._num_listed[f"sources.{index}"] = num_listed
            for key, values in found.groups():
                yield from _merged(key, [_unpacked(key, value) for value in values])

    def read(self, record: Record) -> bytes:
        """Returns the image's bytes from the source that listed it."""
        index, _, image = record.image.partition(":")
        return self.sources[int(index)].read(replace(record, image=image))


@dataclass(frozen=True)
class _Listed:
    """What one source lists a key as: a record, or a reject with what there is of one."""

    index: int  # of the source
    reason: str  # "" of a record
    why: str  # the detail of a reject
    record: Record

    @property
    def is_barred(self) -> bool:
        """Whether it has all of a sample and its source still rejects it."""
        return bool(self.reason and self.record.image and self.record.texts.num_texts)

    def entry(self) -> Record | Reject:
        """Returns what the source listed, as the merged source lists it."""
        image = f"{self.index}:{self.record.image}" if self.record.image else ""
        record = replace(self.record, image=image)
        if not self.reason:
            return record
        return Reject(
            record.key, record.split, self.reason, self.why, record.fingerprint, remains=record
        )


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
    with_image = next((listed for listed in found if listed.record.image), None)
    texts = _together([listed.record.texts for listed in found])
    if not allowed or with_image is None or not texts.num_texts:
        return found[0].entry()
    split = allowed[0].record.split
    details = [listed.record.detail for listed in found if listed.record.detail]
    details += [
        f"sources.{listed.index} lists it for {listed.record.split}"
        for listed in allowed
        if listed.record.split != split
    ]
    return Record(
        key=key,
        split=split,
        image=f"{with_image.index}:{with_image.record.image}",
        suffix=with_image.record.suffix,
        texts=texts,
        fingerprint=with_texts(with_image.record.fingerprint, texts),
        detail="; ".join(details),
        tar=with_image.record.tar,
        image_offset=with_image.record.image_offset,
        image_size=with_image.record.image_size,
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


def _packed(index: int, entry: Record | Reject) -> list[Any]:
    """Returns an entry as JSON values."""
    if isinstance(entry, Record):
        reason, why, record = "", "", entry
    else:
        reason, why = entry.reason, entry.detail
        nothing = Record(
            entry.key, entry.split, "", "", Texts(entry.key), entry.fingerprint, detail=""
        )
        record = entry.remains or nothing
    texts = record.texts.to_json().decode()
    return [
        index, reason, why,
        record.split, record.image, record.suffix, texts, record.fingerprint, record.detail,
        record.tar, record.image_offset, record.image_size,
    ]  # fmt: skip


def _unpacked(key: str, values: list[Any]) -> _Listed:
    index, reason, why, split, image, suffix, texts, fingerprint, detail, *place = values
    words = Texts.from_json(texts.encode())
    return _Listed(
        index, reason, why, Record(key, split, image, suffix, words, fingerprint, detail, *place)
    )
