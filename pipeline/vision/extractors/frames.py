"""Features of videos: those of their frames one after the other, each with its time."""

import copy
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from pipeline.data.read.extractor_card import ExtractorCard, PartLayout, wrapped_identity
from pipeline.errors import FeatureError
from pipeline.vision.compress.storage_dtype import Storage, image_to_storage, storage_parts
from pipeline.vision.extractor import Extractor
from pipeline.vision.feature import Feature
from pipeline.vision.preprocess.image import Prepared, Step, cell_boxes, preprocess
from pipeline.vision.preprocess.video import FramesConfig, has_frames, read_frames
from pipeline.vision.preprocess.window import AnyWindow


class ImageExtractor(Extractor, Protocol):
    """An extractor of pictures, which says what happens to their pixels."""

    @property
    def steps(self) -> tuple[Step, ...]:
        """What happens to the pixels before they are normalized."""
        ...


@dataclass(frozen=True)
class Clip(Prepared):
    """A video as its network takes it. `pixels` and `view` are those of the first frame."""

    frames: tuple[Prepared, ...]
    seconds: tuple[float, ...]


def pyav_version() -> str:
    """Returns the version of the library that decodes videos; FeatureError without it."""
    try:
        return importlib.metadata.version("av")
    except importlib.metadata.PackageNotFoundError as error:
        raise FeatureError("extractor.frames needs PyAV: pip install 'sightline[video]'") from error


class FramesExtractor:
    """Another extractor's features of F frames: values (F * R, D), and `times` (F * R,) seconds.

    A picture is a video of one frame, at 0 seconds.
    """

    def __init__(
        self,
        extractor: ImageExtractor,
        config: FramesConfig,
        stored: Storage,
        window: AnyWindow = None,
    ) -> None:
        self._extractor = extractor
        self._exact = extractor.exact()
        self._grid = extractor.card().grid  # of a frame
        self._config = config
        self._storage = stored
        self._window = window
        self._pyav = pyav_version()

    @property
    def name(self) -> str:
        return self.card().name

    def card(self) -> ExtractorCard:
        card = self._extractor.card()
        rule = self._config.rule()
        method: dict[str, Any] = (
            {"windowed": True} if self._window else {}
        )  # as they were not always
        if self._config.folder_rate is not None:  # by their names as text, before
            method |= {"folder_order": "as people count"}
        (entry,) = card.environments
        libraries = entry.libraries | {"av": self._pyav}
        parts = {name: part for name, part in card.parts.items() if name != "scales"}
        assert card.num_regions is not None
        return card.model_copy(
            update={
                "identity": wrapped_identity(card.identity, "frames", rule | method),
                "selection": card.selection | {"frames": rule},
                "num_regions": card.num_regions * self._config.largest(),
                "grid": None,
                "frame_grid": self._grid,
                "boxes": "stored",
                "parts": storage_parts(self._storage, card.dim)
                | parts
                | {"times": PartLayout.of("float32", "R")},
                "environments": (entry.model_copy(update={"libraries": libraries}),),
            }
        )

    def prepare(self, image: bytes) -> Clip:
        if not has_frames(image):
            picture = self._extractor.prepare(image)
            return Clip(picture.pixels, picture.view, (picture,), (0.0,))
        seconds, pictures = zip(*read_frames(image, self._config, self._window), strict=True)
        frames = tuple(preprocess(pixels, self._extractor.steps) for pixels in pictures)
        return Clip(frames[0].pixels, frames[0].view, frames, seconds)

    def extract(self, prepared: Sequence[Prepared]) -> list[Feature]:
        clips = [clip for clip in prepared if isinstance(clip, Clip)]
        assert len(clips) == len(prepared), "not of this extractor's `prepare`"
        frames = [frame for clip in clips for frame in clip.frames]
        found: list[Feature] = []
        for start in range(0, len(frames), max(1, len(clips))):  # never more than a batch at once
            found += self._exact.extract(frames[start : start + len(clips)])
        features = iter(found)
        return [self._merge(clip, [next(features) for _ in clip.frames]) for clip in clips]

    def exact(self) -> Self:
        twin = copy.copy(self)
        twin._storage = "float32"
        return twin

    def _merge(self, clip: Clip, features: Sequence[Feature]) -> Feature:
        converted = image_to_storage(
            np.concatenate([each.values for each in features]), self._storage
        )
        counts = [len(each.values) for each in features]
        parts = {
            name: np.concatenate([each.parts[name] for each in features])
            for name in features[0].parts
        }
        masks = [mask for each in features for mask in each.masks or ()]
        return Feature(
            converted.values,
            np.concatenate(
                [self._boxes(*pair) for pair in zip(clip.frames, features, strict=True)]
            ),
            parts | {"times": np.repeat(np.array(clip.seconds, np.float32), counts)},
            tuple(masks) if features[0].masks is not None else None,
            converted.quantized,
        )

    def _boxes(self, frame: Prepared, feature: Feature) -> np.ndarray:
        if feature.boxes is not None:
            return feature.boxes
        assert self._grid is not None
        return cell_boxes(self._grid, frame.view)
