"""The check of a sample's pictures before they go into a shard.

Most often that is one image. It may also be a video, a folder of frames in a ZIP, or a DICOM, which
are stored as they came and of which extractors make pictures. What is wrong with one is a reason:

- `no-frames`: a folder of frames without any.
- `truncated-video`: fewer frames, or less time, than the file says that it has.
- `undecodable-video`, `undecodable-frames`, `undecodable-dicom`: it cannot be opened, what was
  looked at cannot be decoded, or nothing is in it. An mp4 whose end is missing is of these.
- `oversized-frames`, `oversized-image`: it unpacks to far more than it is large.
- `unsupported-pixels`: a DICOM whose colours no viewer shows.
- the reason of a frame in a folder that is no whole image, with its name.
"""

from typing import Any

from pipeline.data.media.dicom_file import DicomFile
from pipeline.data.media.frame_zip import FrameZip
from pipeline.data.media.image_check import BadImageError, Verify, check_image
from pipeline.data.media.image_file import max_pixels
from pipeline.data.media.kind import is_dicom, is_video, is_zip
from pipeline.data.media.video_file import opened_video
from pipeline.errors import ConfigError
from pipeline.reason import Reason

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
        with opened_video(payload) as (container, stream):
            width, height = stream.width or 0, stream.height or 0
            if min(width, height) < 1:
                raise BadImageError(
                    Reason.UNDECODABLE_VIDEO, f"frames of {width} x {height} pixels"
                )
            if width * height > max_pixels():
                raise BadImageError(Reason.OVERSIZED_IMAGE, f"frames of {width} x {height} pixels")
            if verify == "decode":
                _require_whole(container, stream)
            return width, height
    except ImportError as error:
        raise _lacking("a video", "PyAV", "video") from error


def _require_whole(container: Any, stream: Any) -> None:
    num_shown, end, is_corrupt = 0, -1.0, False
    for packet in container.demux():
        if not packet.size:
            continue
        if packet.stream is stream:
            num_shown += 1
            is_corrupt |= packet.is_corrupt
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    if not num_shown:
        raise BadImageError(Reason.UNDECODABLE_VIDEO, "there is no frame in it")
    if is_corrupt or num_shown < stream.frames:
        detail = f"{num_shown} of {stream.frames or 'unknown'} frames are whole"
        raise BadImageError(Reason.TRUNCATED_VIDEO, detail)
    stated = (container.duration or 0) / 1e6  # of the file, in microseconds
    if 0 <= end < _TIME_SHARE * stated:
        raise BadImageError(Reason.TRUNCATED_VIDEO, f"it ends after {end:.1f} s of {stated:.1f} s")
    container.seek(0)
    if next(container.decode(stream), None) is None:
        raise BadImageError(Reason.UNDECODABLE_VIDEO, "its first frame cannot be decoded")


def _folder_size(payload: bytes, verify: Verify) -> tuple[int, int]:
    with FrameZip(payload) as frames:
        places = range(len(frames) if verify == "decode" else 1)
        sizes = [_frame_size(frames.read(place), frames.name(place), verify) for place in places]
    return sizes[0]


def _frame_size(frame: bytes, name: str, verify: Verify) -> tuple[int, int]:
    try:
        if is_video(frame):
            what = "another ZIP" if is_zip(frame) else "a video"
            raise BadImageError(Reason.UNDECODABLE_FRAMES, f"{what} in a folder of frames")
        if is_dicom(frame):
            return _dicom_size(frame, verify, most_images=1)
        return check_image(frame, verify)
    except BadImageError as error:
        raise BadImageError(error.reason, f"{name}: {error.detail}") from error


def _dicom_size(payload: bytes, verify: Verify, most_images: int | None = None) -> tuple[int, int]:
    try:
        file = DicomFile(payload, header_only=verify == "header")
        if most_images is not None and file.num_images > most_images:
            detail = f"a DICOM of {file.num_images} images in a folder of frames"
            raise BadImageError(Reason.UNDECODABLE_FRAMES, detail)
        if verify == "decode":
            for _ in file.images():
                pass
    except ImportError as error:
        raise _lacking("a DICOM image", "pydicom", "dicom") from error
    return file.width, file.height


def _lacking(what: str, library: str, extra: str) -> ConfigError:
    return ConfigError(f"{what}, which needs {library}: pip install 'sightline[{extra}]'")
