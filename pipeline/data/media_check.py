"""Tells whether bytes are a whole sample's pictures before they go into a shard.

Most often that is one image. It may also be a video, a folder of frames in a ZIP, or a DICOM, which
are stored as they came and of which extractors make pictures. What is wrong with one is a reason:

- `no-frames`: a folder of frames without any.
- `truncated-video`: fewer frames, or less time, than the file says that it has.
- `undecodable-video`, `undecodable-frames`, `undecodable-dicom`: it cannot be opened, what was
  looked at cannot be decoded, or nothing is in it. An mp4 whose end is missing is of these.
- the reason of a frame in a folder that is no whole image, with its name.
"""

import io
import warnings
import zipfile
from typing import Any

from pipeline.data.image_check import BadImageError, Verify, check_image
from pipeline.data.kind import is_dicom, is_video, is_zip
from pipeline.errors import ConfigError

_TIME_SHARE = 0.9  # of a file's stated length that its packets must reach: tracks may differ


def check_media(payload: bytes, verify: Verify) -> tuple[int, int]:
    """Returns the width and height in pixels of an image, or of the first frame of several.

    As stored, before any turning. `decode` decodes every pixel of an image, of a folder's frames
    and of a DICOM; of a video it reads every packet and decodes the first frame, since decoding all
    takes as long as an hour of film is. `header` reads sizes only. Raises BadImageError, and
    ConfigError if the library that reads such a file is not installed.
    """
    if is_zip(payload):
        return _folder_size(payload, verify)
    if is_video(payload):
        return _video_size(payload, verify)
    if is_dicom(payload):
        return _dicom_size(payload, verify)
    return check_image(payload, verify)


def _video_size(payload: bytes, verify: Verify) -> tuple[int, int]:
    try:
        import av
    except ImportError as error:
        raise _lacking("a video", "PyAV", "video") from error
    try:
        with av.open(io.BytesIO(payload)) as container:
            if not container.streams.video:
                raise BadImageError("undecodable-video", "there is no video stream in it")
            stream = container.streams.video[0]
            if verify == "decode":
                _require_whole(container, stream)
            return stream.width, stream.height
    except av.error.FFmpegError as error:
        detail = f"{type(error).__name__}: {error}; {len(payload)} bytes"
        raise BadImageError("undecodable-video", detail) from error


def _require_whole(container: Any, stream: Any) -> None:
    packets = [packet for packet in container.demux() if packet.size]
    shown = [packet for packet in packets if packet.stream is stream]
    if not shown:
        raise BadImageError("undecodable-video", "there is no frame in it")
    if any(packet.is_corrupt for packet in shown) or len(shown) < stream.frames:
        detail = f"{len(shown)} of {stream.frames or 'unknown'} frames are whole"
        raise BadImageError("truncated-video", detail)
    ends = [
        float((packet.pts + (packet.duration or 0)) * packet.time_base)
        for packet in packets
        if packet.pts is not None
    ]
    stated = (container.duration or 0) / 1e6  # of the file, in microseconds
    if ends and max(ends) < _TIME_SHARE * stated:
        detail = f"it ends after {max(ends):.1f} s of {stated:.1f} s"
        raise BadImageError("truncated-video", detail)
    container.seek(0)
    if next(container.decode(stream), None) is None:
        raise BadImageError("undecodable-video", "its first frame cannot be decoded")


def _folder_size(payload: bytes, verify: Verify) -> tuple[int, int]:
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as folder:
            names = sorted(name for name in folder.namelist() if not name.endswith("/"))
            if not names:
                raise BadImageError("no-frames", "a folder of frames without any")
            sizes = [
                _frame_size(folder.read(name), name, verify)
                for name in (names if verify == "decode" else names[:1])
            ]
            return sizes[0]
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise BadImageError("undecodable-frames", f"{error}; {len(payload)} bytes") from error


def _frame_size(frame: bytes, name: str, verify: Verify) -> tuple[int, int]:
    if is_video(frame):
        raise BadImageError("undecodable-frames", f"{name}: a video in a folder of frames")
    try:
        return check_media(frame, verify)
    except BadImageError as error:
        raise BadImageError(error.reason, f"{name}: {error.detail}") from error


def _dicom_size(payload: bytes, verify: Verify) -> tuple[int, int]:
    try:
        import pydicom
        from pydicom.pixels.utils import pixel_array
    except ImportError as error:
        raise _lacking("a DICOM image", "pydicom", "dicom") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd values that stop nobody from seeing it
            whole = verify == "decode"
            dataset = pydicom.dcmread(io.BytesIO(payload), stop_before_pixels=not whole)
            if whole:
                pixel_array(dataset)
            return int(dataset.Columns), int(dataset.Rows)
    except Exception as error:  # readers let many kinds through on damaged files
        detail = f"{type(error).__name__}: {error}; {len(payload)} bytes"
        raise BadImageError("undecodable-dicom", detail) from error


def _lacking(what: str, library: str, extra: str) -> ConfigError:
    return ConfigError(f"{what}, which needs {library}: pip install 'sightline[{extra}]'")
