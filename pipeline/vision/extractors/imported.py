"""Imported features: published ones, joined by key, shard by shard."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field

from pipeline import storage
from pipeline.config import Config
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.manifest.schema import FeatureRow, to_table
from pipeline.data.read.extractor_card import (
    ExtractionEnvironment,
    ExtractorCard,
    PartLayout,
    identity,
    write_card,
)
from pipeline.data.sample import safe_key
from pipeline.data.sources.image_files import image_name
from pipeline.data.tars.shard import ShardWriter
from pipeline.errors import ConfigError, FeatureError, UnusableImageError
from pipeline.reason import Reason
from pipeline.vision.compress.storage_dtype import (
    Storage,
    describe_storage,
    measure_storage_loss,
    storage_parts,
)
from pipeline.vision.extractors.published import Boxes, PublishedFeatures, open_published
from pipeline.vision.feature import Feature
from pipeline.vision.preprocess.image import Prepared
from pipeline.vision.sidecar import list_reject, write_feature

MEASURED_IMAGES = 5
_JUDGED_IMAGES = 256  # by whose boxes it is told how those of all are written


class ImportedConfig(Config):
    """Features that `import_features` gave a dataset; it says what to put here."""

    type: Literal["imported"] = Field(
        default="imported", description="features that `import_features` gave the dataset"
    )
    identity: str = Field(
        pattern=r"^[0-9a-f]{32}$", description="which: what `import_features` said to put here"
    )
    dim: int = Field(ge=1, description="values of a region")

    def check(self) -> None:
        """Nothing can be missing: nothing is computed."""

    def build(self, device: str = "cpu") -> "ImportedExtractor":
        """Returns what stands for the extractor that somebody else had."""
        return ImportedExtractor(self, device)


class ImportedExtractor:
    """Knows the name of imported features. It can make none: the network is not ours."""

    def __init__(self, config: ImportedConfig, device: str) -> None:
        self._config = config
        self._device = device

    @property
    def name(self) -> str:
        return self.card().name

    def card(self) -> ExtractorCard:
        return ExtractorCard(
            type="imported",
            identity=self._config.identity,
            config=self._config.model_dump(mode="json"),
            weights=None,
            dim=self._config.dim,
            grid=None,
            boxes="stored",
            environments=(ExtractionEnvironment.here(self._device),),
        )

    def prepare(self, image: bytes) -> Prepared:  # noqa: ARG002
        raise ConfigError(
            f"{self.name}: these features were imported, and cannot be computed for a picture that "
            "is not among the published ones; use an extractor such as `regions`"
        )

    def extract(self, prepared: Sequence[Prepared]) -> list[Feature]:
        return [self._none() for _ in prepared]

    def exact(self) -> Self:
        return self

    def _none(self) -> Feature:
        raise FeatureError(f"{self.name}: these features were imported and cannot be computed")


@dataclass(frozen=True)
class ImportReport:
    """What an import did, and what it leaves."""

    extractor: str  # the folder under features/
    card: ExtractorCard  # its `config` is what a recipe's `features.extractor` takes
    num_images: int  # imported by this run
    num_unchanged: int  # live samples that had these features, or were rejects, before
    num_missing: int  # live samples without published features
    num_unused: int  # published images that are no live sample
    num_repeated: int  # lines that say again what another has said
    rejects: Mapping[str, int]  # live samples whose published features cannot be used, by reason
    size_bytes: int  # of the sidecars written by this run


def import_features(
    url: str,
    location: str,
    stored: Storage = "float16",
    class_names: Sequence[str] = (),
    boxes: Boxes | None = None,
) -> ImportReport:
    """Gives the live samples of the newest version of a dataset their published features.

    An id is matched with the key it would have, with the number at its end as COCO's keys have it
    (COCO_val2014_000000000042 with 000000000042), or without an extension. `stored: float32`
    keeps the published values to the last bit. `class_names` say what the labels mean, from 0 on;
    the publisher's list has them (objects_vocab.txt). A second run does what is left. An image
    whose features cannot be used is listed with the reason, as `extract` does it.

    `boxes` says how boxes in pixels are written: None is as corners, unless that cannot be. Raises
    FeatureError then, and if no id is a key, two ids are the same one, or nothing can be read.
    """
    url = storage.absolute(url)
    published = open_published(location)
    manifest = Manifest.open(url)
    samples = manifest.samples(["key", "shard", "image_offset"])
    ids = match(published.ids(), set(samples["key"].to_pylist()), location)
    if boxes is None:
        _require_corners(published, list(ids.values()), location)
    form = boxes or "corners"
    card = _card(published, list(ids.values()), stored, form)
    card = card.model_copy(update={"class_names": tuple(class_names) or None})
    name = card.name
    listed = manifest.features(name)
    known = listed.rows(["key", "shard"])
    done = set(zip(known["key"].to_pylist(), known["shard"].to_pylist(), strict=True))
    shards: dict[str, list[str]] = {}
    for row in samples.sort_by([("shard", "ascending"), ("image_offset", "ascending")]).to_pylist():
        if row["key"] in ids:
            shards.setdefault(row["shard"], []).append(row["key"])
    to_do = {shard: keys for shard, keys in shards.items() if {(k, shard) for k in keys} - done}
    if to_do:
        write_card(url, card)
    size_bytes, num_images = 0, 0
    for shard, keys in to_do.items():
        rows = []
        with ShardWriter(storage.join(url, "features", name), shard) as writer:
            for key in keys:
                try:
                    feature = published.read(ids[key], stored, form)
                    _check_parts(card, feature)
                    rows.append(write_feature(writer, shard, key, feature))
                except UnusableImageError as error:
                    rows.append(list_reject(shard, key, error))
        listed.commit(to_table(rows, FeatureRow))
        with_feature = sum(row.reason is None for row in rows)
        num_images += with_feature
        if with_feature:  # an empty one is not published
            size_bytes += writer.shard.size_bytes
    num_done = sum(len(keys) for keys in to_do.values())
    unusable = samples.join(listed.rejects(), ["key", "shard"], join_type="inner")
    return ImportReport(
        extractor=name,
        card=card,
        num_images=num_images,
        num_unchanged=len(ids) - num_done,
        num_missing=samples.num_rows - len(ids),
        num_unused=len(published.ids()) - len(ids),
        num_repeated=published.num_repeated,
        rejects=Counter(unusable["reason"].to_pylist()),
        size_bytes=size_bytes,
    )


def match(published: Iterable[str], keys: set[str], where: str) -> dict[str, str]:
    """Returns for each key that has one its published id, or raises FeatureError."""
    found: dict[str, str] = {}
    first = None
    for image_id in published:
        first = first or image_id
        key = next((name for name in _candidates(image_id) if name in keys), None)
        if key is None:
            continue
        if key in found:
            raise FeatureError(f"{where}: both {found[key]!r} and {image_id!r} are sample {key!r}")
        found[key] = image_id
    if not found:
        raise FeatureError(
            f"{where}: none of its images is a sample of the dataset; its first id is {first!r}, "
            f"a key is {min(keys, default='')!r}"
        )
    return found


def _candidates(image_id: str) -> list[str]:
    stem = image_name(re.sub(r"\.npz$", "", image_id, flags=re.IGNORECASE))
    names = [safe_key(image_id), safe_key(stem)]
    number = re.search(r"(?:^|_)(\d{1,12})$", stem)
    return [*names, f"{int(number[1]):012d}"] if number else names


def _require_corners(published: PublishedFeatures, ids: Sequence[str], location: str) -> None:
    """Raises FeatureError if boxes make sense as x, y, width, height alone."""
    if published.is_only(ids[:: -(-len(ids) // _JUDGED_IMAGES)], "xywh"):
        raise FeatureError(
            f"{location}: its boxes cannot all be x1, y1, x2, y2: in some x2 < x1 or y2 < y1, and "
            "as x, y, width, height all lie in their pictures. Say which they are: "
            "--boxes xywh, or --boxes corners to reject the images that do not fit"
        )


def _card(
    published: PublishedFeatures, ids: Sequence[str], stored: Storage, boxes: Boxes
) -> ExtractorCard:
    """Reads a few images to tell width, parts and the error of storage."""
    few: list[Feature] = []
    exact: list[Feature] = []
    unusable: UnusableImageError | None = None
    for image_id in ids:
        try:
            pair = [published.read(image_id, each, boxes) for each in ("float32", stored)]
            exact.append(pair[0])
            few.append(pair[1])
        except UnusableImageError as error:
            unusable = unusable or error
        if len(few) == MEASURED_IMAGES:
            break
    if not few:
        raise FeatureError(f"none of {len(ids)} images has features that can be used: {unusable}")
    dim = exact[0].values.shape[1]
    parts = storage_parts(stored, dim) | {
        name: PartLayout.of(array.dtype.name, "R", *array.shape[1:])
        for name, array in exact[0].parts.items()
    }
    rule = describe_storage(stored)
    layout = {"layout": published.layout} | ({"boxes": boxes} if boxes == "xywh" else {})
    found = identity("imported", published.digest, [], layout, rule)
    environment = ExtractionEnvironment.here("cpu")
    measured = environment.model_copy(update={"storage_error": measure_storage_loss(exact, few)})
    return ExtractorCard(
        type="imported",
        identity=found,
        config=ImportedConfig(identity=found, dim=dim).model_dump(mode="json"),
        weights=None,
        selection=layout | {"files_digest": published.digest},
        storage=rule,
        dtype=rule["dtype"],
        dim=dim,
        num_regions=max(len(feature.values) for feature in exact),
        grid=None,
        boxes="stored",
        parts=parts,
        environments=(measured,),
    )


def _check_parts(card: ExtractorCard, feature: Feature) -> None:
    """Raises UnusableImageError unless the feature has what the card says that all have."""
    found = {name: array.shape[1:] for name, array in feature.parts.items()}
    expected = {name: part.shape[1:] for name, part in card.parts.items() if name != "scales"}
    if found != expected or feature.values.shape[1] != card.dim:
        raise UnusableImageError(
            Reason.OTHER_LAYOUT,
            f"published with {feature.values.shape[1]} values a region and {found}, others with "
            f"{card.dim} and {expected}",
        )
