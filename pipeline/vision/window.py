"""Values of more than eight bits to grey levels, by a window that is stated.

A window is what radiologists read images by: which values lie between black and white. Values are
those of the modality (Hounsfield units of a CT) where the file says how to get them.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipeline.config import Config
from pipeline.errors import ConfigError, FeatureError


class Window(Config):
    """The values around `center` that become grey levels; those beyond are black or white."""

    center: float
    width: float = Field(gt=1)


# `stored`: of a DICOM, the first window that it states itself. None: DICOM is refused, and other
# 16-bit pictures are scaled to eight bits.
AnyWindow = Window | Literal["stored"] | None


def describe_window(window: AnyWindow) -> list[dict[str, Any]]:
    """Returns the step as the card lists it; none without a window, which changes nothing then."""
    if window is None:
        return []
    settings = {"window": window} if window == "stored" else window.model_dump(mode="json")
    return [{"step": "window of DICOM and 16-bit values, linear"} | settings]


def apply_window(values: npt.NDArray[Any], window: Window) -> npt.NDArray[np.uint8]:
    """Maps values to 0 to 255 by DICOM's linear function (PS3.3, C.11.2.1.2.1)."""
    shares = (values.astype(np.float64) - (window.center - 0.5)) / (window.width - 1) + 0.5
    levels: npt.NDArray[np.uint8] = np.rint(255 * shares.clip(0, 1)).astype(np.uint8)
    return levels


def decode_dicom(
    payload: bytes, window: AnyWindow
) -> tuple[list[npt.NDArray[np.uint8]], float | None]:
    """Returns a DICOM's images as RGB (height, width, 3), and the seconds from one to the next.

    Grey values are rescaled as the file says and windowed; MONOCHROME1, whose least value is
    white, is turned over. Colours of eight bits are left as they are. The seconds are None if the
    file does not say. Raises FeatureError saying why it cannot be shown.
    """
    with _faults_told(payload):
        from pydicom.pixels.processing import apply_rescale
        from pydicom.pixels.utils import pixel_array

        dataset = _read(payload)
        values = pixel_array(dataset)
        images = values if _num_images(dataset) > 1 else values[None]
        return [
            _colours(image)
            if image.ndim == 3
            else _grey(apply_rescale(image, dataset), dataset, window)
            for image in images
        ], _seconds(dataset)


def num_images(payload: bytes) -> int:
    """Returns how many images a DICOM holds, from its header; raises FeatureError."""
    with _faults_told(payload):
        return _num_images(_read(payload, stop_before_pixels=True))


@contextlib.contextmanager
def _faults_told(payload: bytes) -> Iterator[None]:
    try:
        yield
    except FeatureError:
        raise
    except ImportError as error:
        raise ConfigError(
            "a DICOM image, which needs pydicom: pip install 'sightline[dicom]'"
        ) from error
    except Exception as error:  # readers let many kinds through on damaged files
        raise FeatureError(
            f"not a readable DICOM image ({type(error).__name__}: {error}); {len(payload)} bytes"
        ) from error


def _read(payload: bytes, **options: bool) -> Any:
    import pydicom

    return pydicom.dcmread(io.BytesIO(payload), **options)


def _num_images(dataset: Any) -> int:
    return int(dataset.get("NumberOfFrames") or 1)


def _seconds(dataset: Any) -> float | None:
    """Returns the time from one image to the next: FrameTime is in milliseconds."""
    if dataset.get("FrameTime"):
        return float(dataset.FrameTime) / 1000
    rate = dataset.get("CineRate") or dataset.get("RecommendedDisplayFrameRate")
    return 1 / float(rate) if rate else None


def _grey(values: npt.NDArray[Any], dataset: Any, window: AnyWindow) -> npt.NDArray[np.uint8]:
    grey = apply_window(values, _window(dataset, window))
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        grey = 255 - grey
    return np.repeat(grey[:, :, None], 3, axis=2)


def _colours(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if values.dtype != np.uint8 or values.shape[2] != 3:
        raise FeatureError(
            f"a DICOM image in colour of {values.dtype} {values.shape}; expected eight bits of "
            "red, green and blue"
        )
    return values


def _window(dataset: Any, window: AnyWindow) -> Window:
    if isinstance(window, Window):
        return window
    if window is None:
        raise FeatureError(
            "a DICOM image, and extractor.window is not given; set it to {center, width}, or to "
            "`stored` for the window that each file states"
        )
    function = dataset.get("VOILUTFunction") or "LINEAR"
    stated = [_first(dataset.get(name)) for name in ("WindowCenter", "WindowWidth")]
    if None in stated or function != "LINEAR":
        raise FeatureError(
            f"a DICOM image without a linear window of its own (center {stated[0]}, width "
            f"{stated[1]}, function {function}); set extractor.window to {{center, width}}"
        )
    return Window(center=float(stated[0]), width=float(stated[1]))


def _first(value: Any) -> Any:
    """Returns the first of several values: files may state one window for bone, one for tissue."""
    return value[0] if isinstance(value, Sequence) and not isinstance(value, str) else value
