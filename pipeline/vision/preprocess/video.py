"""Video decoding: the frames that stand for a video, with their times.

Which frames there are is read from the packets, without decoding any. Decoding then starts at the
nearest key frame before a wanted one, or goes on where it is if that is nearer.
"""

import bisect
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from pipeline.config import Config
from pipeline.data.media.frame_zip import FrameZip
from pipeline.data.media.image_file import BadImageError
from pipeline.data.media.image_pixels import Pixels
from pipeline.data.media.kind import is_dicom, is_video, is_zip
from pipeline.data.media.video_file import opened_video, upright
from pipeline.errors import ConfigError, FeatureError, UnusableImageError
from pipeline.vision.preprocess.image import decode
from pipeline.vision.preprocess.window import AnyWindow, decode_dicom, num_images

Frame = tuple[float, Pixels]  # seconds since the first frame, and the picture


class FramesConfig(Config):
    """Which frames of a video its features are of; one of `count` and `rate` is given."""

    count: int | None = Field(
        default=None, ge=1, le=4096, description="frames, in the middle of as many equal parts"
    )
    rate: float | None = Field(
        default=None, gt=0, description="frames a second, from the first one on"
    )
    most: int = Field(
        default=256, ge=1, description="a video with more frames at this rate is refused"
    )
    folder_rate: float | None = Field(
        default=None,
        gt=0,
        description="frames a second of a video that comes as a folder of pictures (a ZIP of "
        "them, by name, 2 before 10), or as a DICOM that does not say",
    )

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if (self.count is None) == (self.rate is None):
            raise ValueError("give either count or rate: how many frames, or how many a second")
        return self

    def rule(self) -> dict[str, Any]:
        """Returns what frames and their times depend on."""
        return self.model_dump(mode="json", exclude={"most"}, exclude_none=True)

    def largest(self) -> int:
        """Returns the most frames that a video can have."""
        return self.most if self.count is None else self.count


def has_frames(payload: bytes) -> bool:
    """Whether a part is a video, a folder of frames, or a DICOM of several images."""
    return is_video(payload) or (is_dicom(payload) and num_images(payload) > 1)


def read_frames(payload: bytes, config: FramesConfig, window: AnyWindow = None) -> list[Frame]:
    """Returns the frames that the rule asks for, in order of time, none of them twice.

    The window is for DICOM and for 16-bit pictures. Raises FeatureError if the video cannot be read
    or has more frames than `most`.
    """
    try:
        if is_zip(payload):
            return _folder_frames(payload, config, window)
        if is_dicom(payload):
            return _dicom_frames(payload, config, window)
        with opened_video(payload) as (container, stream):
            return list(_video_frames(container, stream, config))
    except ImportError as error:
        raise ConfigError("a video, which needs PyAV: pip install 'sightline[video]'") from error
    except BadImageError as error:
        what = "folder of frames" if is_zip(payload) else "video"
        raise UnusableImageError(error.reason, f"a {what}: {error.detail}") from error


def choose(times: Sequence[float], config: FramesConfig) -> list[int]:
    """Returns which of the frames that begin at these seconds, the first at 0, are wanted.

    A frame is shown until the next one begins; the last as long as frames last on average.
    """
    length = times[-1] + (times[-1] / (len(times) - 1) if len(times) > 1 else 1)
    if config.count is not None:
        wanted = [(part + 0.5) * length / config.count for part in range(config.count)]
    else:
        assert config.rate is not None
        number = int(np.ceil(length * config.rate - 1e-6))
        if number > config.most:
            raise FeatureError(
                f"a video of {length:.1f} s has {number} frames at {config.rate:g} a second; "
                f"extractor.frames.most is {config.most}: raise it, or lower the rate"
            )
        wanted = [part / config.rate for part in range(number)]
    shown = (bisect.bisect_right(times, second + 1e-6) - 1 for second in wanted)
    return list(dict.fromkeys(shown))


def _video_frames(container: Any, stream: Any, config: FramesConfig) -> Iterator[Frame]:
    packets = [packet for packet in container.demux(stream) if packet.pts is not None]
    stamps = sorted(packet.pts for packet in packets if not packet.is_discard)
    keys = sorted(packet.pts for packet in packets if packet.is_keyframe)
    if not stamps or not keys:
        raise FeatureError("a video whose frames have no times")
    seconds = [float((stamp - stamps[0]) * stream.time_base) for stamp in stamps]
    frames: Iterator[Any] = iter(())
    decoded = -1  # the place of what was decoded last
    for place in choose(seconds, config):
        key = keys[max(0, bisect.bisect_right(keys, stamps[place]) - 1)]
        if decoded < 0 or key > stamps[decoded]:
            container.seek(key, stream=stream)
            frames = container.decode(stream)
        frame = next((frame for frame in frames if frame.pts == stamps[place]), None)
        if frame is None:
            raise FeatureError(f"a video whose frame at {seconds[place]:.3f} s cannot be decoded")
        decoded = place
        yield seconds[place], upright(frame)


def _dicom_frames(payload: bytes, config: FramesConfig, window: AnyWindow) -> list[Frame]:
    def wanted(stated: list[float] | None, number: int) -> tuple[list[float], list[int]]:
        times = stated or [0.0]
        if stated is None and number > 1:
            rate = _folder_rate("a DICOM of several images", config)
            times = [place / rate for place in range(number)]
        return times, choose(times, config)

    return decode_dicom(payload, window, wanted)


def _folder_rate(what: str, config: FramesConfig) -> float:
    if config.folder_rate is None:
        raise FeatureError(
            f"{what}, which does not say how many there are a second; set "
            "extractor.frames.folder_rate"
        )
    return config.folder_rate


def _folder_frames(payload: bytes, config: FramesConfig, window: AnyWindow) -> list[Frame]:
    rate = _folder_rate("a folder of frames", config)
    with FrameZip(payload) as frames:
        times = [place / rate for place in range(len(frames))]
        found = []
        for place in choose(times, config):
            try:
                found.append((times[place], decode(frames.read(place), window)))
            except FeatureError as error:
                raise FeatureError(f"a folder of frames: {frames.name(place)}: {error}") from error
        return found
