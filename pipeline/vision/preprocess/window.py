"""Windowing: grey levels of wide-range values, by a window that is stated.

A window is what radiologists read images by: which values lie between black and white. Values are
those of the modality (Hounsfield units of a CT) where the file says how to get them.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipeline.config import Config
from pipeline.data.media.dicom_file import DicomFile
from pipeline.data.media.image_file import BadImageError
from pipeline.errors import ConfigError, FeatureError, UnusableImageError

Pixels = npt.NDArray[np.uint8]
# From the times of images, or None, and their number, to times and the places that are wanted.
Choice = Callable[[list[float] | None, int], tuple[Sequence[float], Sequence[int]]]


class Window(Config):
    """The values around `center` that become grey levels; those beyond are black or white."""

    center: float = Field(description="the value in the middle of those that become grey levels")
    width: float = Field(
        gt=1, description="how many values become grey levels; those beyond are black or white"
    )


# `stored`: of a DICOM, the first window that it states itself. None: DICOM is refused, and other
# 16-bit pictures are scaled to eight bits.
AnyWindow = Window | Literal["stored"] | None


def describe_window(window: AnyWindow) -> list[dict[str, Any]]:
    """Returns the step as the card lists it; none without a window, which changes nothing then."""
    if window is None:
        return []
    settings = {"window": window} if window == "stored" else window.model_dump(mode="json")
    return [
        {"step": "window of DICOM and 16-bit values, linear, each image by its own units"}
        | settings
    ]


def apply_window(values: npt.NDArray[Any], window: Window) -> npt.NDArray[np.uint8]:
    """Maps values to 0 to 255 by DICOM's linear function (PS3.3, C.11.2.1.2.1)."""
    shares = (values.astype(np.float64) - (window.center - 0.5)) / (window.width - 1) + 0.5
    levels: npt.NDArray[np.uint8] = np.rint(255 * shares.clip(0, 1)).astype(np.uint8)
    return levels


def decode_dicom(
    payload: bytes, window: AnyWindow, choose: Choice | None = None
) -> list[tuple[float, Pixels]]:
    """Returns a DICOM's images as RGB (height, width, 3), each with its time in seconds.

    Grey values are rescaled as the file says of each and windowed; MONOCHROME1, whose least value
    is white, is turned over. Colours, and those that a palette has, are left as they are. `choose`
    is given the times, or how many images there are if it does not say any, and returns the times
    with the places of the images that are wanted; without it there must be one. Raises FeatureError
    saying why it cannot be shown.
    """
    with _read_errors():
        file = DicomFile(payload)
        if choose is None and file.num_images > 1:
            raise FeatureError(
                f"a DICOM of {file.num_images} images; set extractor.frames, as for a video"
            )
        times, places = choose(file.times(), file.num_images) if choose else ([0.0], [0])
        images = zip(places, file.images(places), strict=True)
        return [
            (times[place], values if values.ndim == 3 else _grey(values, file, place, window))
            for place, values in images
        ]


def num_images(payload: bytes) -> int:
    """Returns how many images a DICOM holds, from its header; raises FeatureError."""
    with _read_errors():
        return DicomFile(payload, header_only=True).num_images


@contextlib.contextmanager
def _read_errors() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            "a DICOM image, which needs pydicom: pip install 'sightline[dicom]'"
        ) from error
    except BadImageError as error:
        raise UnusableImageError(error.reason, f"a DICOM image: {error.detail}") from error


def _grey(
    values: npt.NDArray[Any], file: DicomFile, place: int, window: AnyWindow
) -> npt.NDArray[np.uint8]:
    grey = apply_window(values, _window(file, place, window))
    if file.photometry == "MONOCHROME1":
        grey = 255 - grey
    return np.repeat(grey[:, :, None], 3, axis=2)


def _window(file: DicomFile, place: int, window: AnyWindow) -> Window:
    if isinstance(window, Window):
        return window
    if window is None:
        raise FeatureError(
            "a DICOM image, and extractor.window is not given; set it to {center, width}, or to "
            "`stored` for the window that each file states"
        )
    center, width, function = file.stated_window(place)
    if center is None or width is None or not width > 1 or function != "LINEAR":
        raise FeatureError(
            f"a DICOM image without a linear window of its own (center {center}, width {width}, "
            f"function {function}); set extractor.window to {{center, width}}"
        )
    return Window(center=center, width=width)
