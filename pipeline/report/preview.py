"""The preview of a dataset: samples with everything that people wrote about them."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.data.manifest.manifest import Manifest
from pipeline.data.read.dataset import Dataset, FeatureBatch, Split
from pipeline.data.read.extractor_card import ExtractorCard, card_location, read_card
from pipeline.data.sample import Texts
from pipeline.errors import FeatureError
from pipeline.report.colours import colour_layer, principal_colours
from pipeline.report.curves import spread
from pipeline.report.detections import Found, found
from pipeline.report.heat import Heat, heat
from pipeline.report.inline_image import InlineImage, inline_image, shared_ratio, shrink, still
from pipeline.report.page import render
from pipeline.vision.extractors.network import NetworkConfig
from pipeline.vision.extractors.registry import settings_of
from pipeline.vision.preprocess.video import has_frames, read_frames
from pipeline.vision.preprocess.window import Window

REJECTS_PER_REASON = 5  # keys named as examples


@dataclass(frozen=True)
class SplitCounts:
    name: str
    samples: int
    captions: int
    questions: int
    rounds: int


@dataclass(frozen=True)
class RejectReason:
    reason: str
    count: int
    examples: tuple[tuple[str, str], ...]  # key and detail


@dataclass(frozen=True)
class Colours:
    """A layer of coloured cells, and the part of the picture it covers, in percent."""

    url: str
    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Shown:
    """A sample ready to be drawn."""

    key: str
    split: str
    row: int
    picture: InlineImage
    texts: Texts
    questions: tuple[tuple[str, str], ...]  # question, and its answers with their counts
    heat: Heat | None
    outlined: int  # boxes to outline: all of a detector's, none of a grid's
    found: Found | None  # labels and masks, of a detector that gives some
    colours: Colours | None  # of a grid
    seconds: tuple[float, ...]  # of a video, when the frames are that features were made of
    frame: int | None  # the one of these that is shown


def write_preview(dataset: str, location: str, limit: int, features: str | None = None) -> str:
    """Writes a page of about `limit` samples, spread evenly over each split; returns where.

    `features` is an extractor's name: its grid is drawn as the norm of each cell, its regions as
    boxes with labels, scores and masks if it gives them. Of a video, the frame in the middle is
    shown with its grid. Raises ManifestError if there is no dataset, FeatureError if there are no
    features.
    """
    opened = Dataset.open(dataset)
    card = _card(dataset, features) if features else None
    grid = (card.grid or card.frame_grid) if card else None
    splits = [opened.split(name, features) for name in opened.splits()]
    counts = [_counts(split) for split in splits]
    samples = [
        sample
        for split in splits
        for sample in _shown(split, max(1, limit // len(splits)), card, grid)
    ]
    page = render(
        "preview.html",
        name=dataset.rstrip("/").rsplit("/", 1)[-1],
        url=dataset,
        version=opened.version,
        features=features or "",
        detected=any(sample.found for sample in samples),
        grid=grid,
        splits=counts,
        totals={
            kind: sum(getattr(split, kind) for split in counts)
            for kind in ("samples", "captions", "questions", "rounds")
        },
        rejects=_rejects(Manifest.open(dataset, opened.version)),
        samples=samples,
        ratio=shared_ratio([sample.picture for sample in samples]),
    )
    storage.write_bytes(location, page)
    return location


def norms(batch: FeatureBatch, index: int) -> NDArray[np.float32]:
    """Returns the length of each region's stored vector, shifted so that the shortest is 0."""
    count = int(batch.num_regions[index])
    lengths = np.linalg.norm(batch.values[index, :count].astype(np.float64), axis=1)
    shifted: NDArray[np.float32] = (lengths - lengths.min(initial=np.inf)).astype(np.float32)
    return shifted


def _shown(
    split: Split, limit: int, card: ExtractorCard | None, grid: tuple[int, int] | None
) -> Iterator[Shown]:
    rows = spread(split.num_samples, limit).tolist()
    stills = [_still(split.image(row), card) for row in rows]
    seen = [_seen(split, *pair) for pair in zip(rows, stills, strict=True)] if card else []
    colours = _colours([each.batch for each in seen], grid) if grid else [None] * len(rows)
    for number, (row, shown) in enumerate(zip(rows, stills, strict=True)):
        (texts,) = split.texts([row])
        drawn, layers = None, None
        if card is not None:
            batch = seen[number].batch
            count = int(batch.num_regions[0])
            boxes = batch.boxes[0, :count]
            bright = norms(batch, 0) if batch.scores is None else batch.scores[0, :count]
            drawn = heat(bright[None], boxes, grid) if count else None
            ratio = shown.picture.width / shown.picture.height
            layers = found(batch, 0, card.class_names, seen[number].masks, ratio)
        yield Shown(
            key=split.keys([row])[0],
            split=split.name,
            row=row,
            picture=shown.picture,
            texts=texts,
            questions=tuple((asked.question, _answers(asked.answers)) for asked in texts.questions),
            heat=drawn,
            outlined=0 if grid or drawn is None else len(boxes),
            found=layers,
            colours=colours[number],
            seconds=seen[number].seconds if seen else (),
            frame=shown.frame,
        )


@dataclass(frozen=True)
class Still:
    """What is shown of a sample, and, of a video, which of its extractor's frames that is."""

    picture: InlineImage
    frame: int | None = None


@dataclass(frozen=True)
class Seen:
    """What an extractor made of what is shown."""

    batch: FeatureBatch  # of one sample
    masks: list[dict[str, Any]] | None
    seconds: tuple[float, ...]  # of all frames of a video


def _still(image: bytes, card: ExtractorCard | None) -> Still:
    """Returns the picture, or the middle one of the frames that a card's rule takes."""
    settings = settings_of(card) if card else None
    rule, window = None, None
    if isinstance(settings, NetworkConfig):
        rule = settings.frames
        window = settings.window if isinstance(settings.window, Window) else None
    if rule and has_frames(image):
        frames = read_frames(image, rule, window or "stored")
        return Still(inline_image(shrink(frames[len(frames) // 2][1])), len(frames) // 2)
    return Still(inline_image(shrink(still(image, window or "stored"))))


def _seen(split: Split, row: int, shown: Still) -> Seen:
    """Reads the features of what is shown: of a video, of one frame."""
    batch, masks = split.features([row]), split.masks(row)
    if shown.frame is None or batch.times is None:
        return Seen(batch, masks, ())
    times = batch.times[0, : batch.num_regions[0]]
    seconds = np.unique(times)
    here = np.flatnonzero(times == seconds[shown.frame])
    arrays = {
        name: array[:, here]
        for name, array in vars(batch).items()
        if array is not None and name != "num_regions"
    }
    return Seen(
        FeatureBatch(**arrays, num_regions=np.array([len(here)], np.int32)),
        masks and [masks[region] for region in here.tolist()],
        tuple(seconds.tolist()),
    )


def _colours(batches: list[FeatureBatch], grid: tuple[int, int]) -> list[Colours | None]:
    """Returns a layer for each sample; a colour means the same in all of them."""
    values = np.concatenate([batch.values for batch in batches])
    count, cells, dim = values.shape
    colours = principal_colours(values.reshape(count * cells, dim).astype(np.float32))
    layers: list[Colours | None] = []
    for batch, sample in zip(batches, colours.reshape(count, cells, 3), strict=True):
        boxes = 100 * batch.boxes[0]
        (left, top), (right, bottom) = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
        place = (float(left), float(top), float(right - left), float(bottom - top))
        layers.append(Colours(colour_layer(sample, grid), *place))
    return layers


def _answers(answers: tuple[str, ...]) -> str:
    counts = Counter(answers).most_common()
    return ", ".join(
        f"{answer} ×{count}" if len(answers) > 1 else answer for answer, count in counts
    )


def _counts(split: Split) -> SplitCounts:
    return SplitCounts(
        name=split.name,
        samples=split.num_samples,
        captions=split.num_texts("captions"),
        questions=split.num_texts("questions"),
        rounds=split.num_texts("rounds"),
    )


def _rejects(manifest: Manifest) -> list[RejectReason]:
    """Counts the rejects by reason, the most frequent first, with a few named."""
    rows = manifest.rejects(["key", "reason", "detail"]).sort_by("key").to_pylist()
    by_reason: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_reason.setdefault(row["reason"], []).append(row)
    return [
        RejectReason(
            reason=reason,
            count=len(found),
            examples=tuple((row["key"], row["detail"] or "") for row in found[:REJECTS_PER_REASON]),
        )
        for reason, found in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0]))
    ]


def _card(dataset: str, features: str) -> ExtractorCard:
    card = read_card(dataset, features)
    if card is None:
        known = storage.list_names(storage.join(dataset, "features"))
        raise FeatureError(
            f"{card_location(dataset, features)}: no such features; this dataset has "
            f"{', '.join(known) or 'none'}"
        )
    return card
