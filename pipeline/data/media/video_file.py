"""A video file, opened by PyAV, and the one of its streams that is shown."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.media.image_file import BadImageError
from pipeline.errors import PipelineError
from pipeline.reason import Reason

# Of streams that are beside the video: its cover, and stills to jump by.
_BESIDE = ("attached_pic", "timed_thumbnails")


@contextlib.contextmanager
def opened_video(payload: bytes) -> Iterator[tuple[Any, Any]]:
    """Opens a video as PyAV's container and the stream that is shown.

    Whatever is wrong with the file, also while it is read, raises BadImageError with reason
    `undecodable-video`. Raises ImportError without PyAV.
    """
    import av

    try:
        with av.open(io.BytesIO(payload), metadata_errors="replace") as container:
            yield container, _shown_stream(container)
    except (BadImageError, PipelineError):
        raise
    except Exception as error:  # readers let many kinds through on damaged files
        detail = f"{type(error).__name__}: {error}; {len(payload)} bytes"
        raise BadImageError(Reason.UNDECODABLE_VIDEO, detail) from error


def upright(frame: Any) -> npt.NDArray[np.uint8]:
    """Returns a frame's RGB pixels (height, width, 3), turned and mirrored as the file says."""
    from av.sidedata.sidedata import Type

    pixels: npt.NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return pixels
    # It takes x and y to a * x + c * y and b * x + d * y, with y downwards.
    (a, b, _), (c, d, _), _ = np.frombuffer(bytes(matrix), np.int32).reshape(3, 3).tolist()
    across, down = a, d
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels = pixels.swapaxes(0, 1)
        across, down = c, b
    pixels = pixels[:, ::-1] if across < 0 else pixels
    pixels = pixels[::-1] if down < 0 else pixels
    return np.ascontiguousarray(pixels)


def _shown_stream(container: Any) -> Any:
    """Returns the stream that players show: the default one, then the largest, then the first."""
    from av.stream import Disposition

    streams = [
        stream
        for stream in container.streams.video
        if not any(Disposition[name] & stream.disposition for name in _BESIDE)
    ]
    if not streams:
        beside = " but its cover" if container.streams.video else ""
        raise BadImageError(Reason.UNDECODABLE_VIDEO, f"there is no video stream in it{beside}")
    return max(
        streams,
        key=lambda stream: (
            stream.frames != 1,  # a still that is not said to be one
            bool(Disposition.default & stream.disposition),
            (stream.width or 0) * (stream.height or 0),
        ),
    )
