"""The frames in a ZIP, in their order, unpacked within bounds.

Frames are sorted as people count: `2.jpg` before `10.jpg`. What systems put beside files
(`__MACOSX/._1.jpg`, `.DS_Store`) is none. A ZIP says how large its members are; no more than that
is unpacked of any, and one that says too much is refused before anything is: a few megabytes may
hold as many gigabytes. Memory: one frame.
"""

import io
import zipfile
from typing import Self

from pipeline.data.media.image_file import BadImageError
from pipeline.data.media.unpacking import most_bytes
from pipeline.data.tars.member_names import is_hidden, natural_order, shown
from pipeline.reason import Reason

MOST_FRAMES = 100_000
MOST_FRAME_BYTES = 256 * 1024**2

_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others cannot be unpacked in bounds
_ENCRYPTED = 1
_ENTRY = b"PK\x01\x02"  # begins each member's entry in the index


class FrameZip:
    """A ZIP of frames. Raises BadImageError where it is none or is damaged, with the reason."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        if payload.count(_ENTRY) > 2 * MOST_FRAMES:  # beside each file its `._` one
            raise BadImageError(Reason.OVERSIZED_FRAMES, f"more than {MOST_FRAMES} files in a ZIP")
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(payload))
        except Exception as error:  # a damaged index fails in many ways
            raise self._damaged(error) from error
        frames = [
            member
            for member in self._zip.infolist()
            if not member.filename.endswith("/") and not is_hidden(member.filename)
        ]
        if not frames:
            raise BadImageError(Reason.NO_FRAMES, "a folder of frames without any")
        self._frames = sorted(frames, key=lambda frame: natural_order(frame.filename))
        self._require_bounds()

    def __len__(self) -> int:
        return len(self._frames)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def name(self, place: int) -> str:
        """Returns a frame's name as it can be printed."""
        return shown(self._frames[place].filename)

    def read(self, place: int) -> bytes:
        """Returns the bytes of the frame at a place in the order."""
        frame = self._frames[place]
        try:
            with self._zip.open(frame) as file:
                unpacked = file.read(frame.file_size)
        except Exception as error:  # as many ways as there are packers
            raise self._damaged(error, place) from error
        if len(unpacked) != frame.file_size:
            cut = EOFError(f"{len(unpacked)} of {frame.file_size} bytes are there")
            raise self._damaged(cut, place)
        return unpacked

    def _require_bounds(self) -> None:
        total, packed = sum(frame.file_size for frame in self._frames), len(self._payload)
        most = most_bytes(packed)
        if len(self._frames) > MOST_FRAMES or total > most:
            raise BadImageError(
                Reason.OVERSIZED_FRAMES,
                f"{len(self._frames)} frames of {total} bytes in a ZIP of {packed}; the most are "
                f"{MOST_FRAMES} frames and {most} bytes",
            )
        for place, frame in enumerate(self._frames):
            if frame.file_size > MOST_FRAME_BYTES:
                detail = f"{frame.file_size} bytes; the most is {MOST_FRAME_BYTES}"
                raise BadImageError(Reason.OVERSIZED_FRAMES, f"{self.name(place)}: {detail}")
            if frame.flag_bits & _ENCRYPTED:
                detail = f"{self.name(place)}: it takes a password to read; pack without one"
                raise BadImageError(Reason.UNDECODABLE_FRAMES, detail)
            if frame.compress_type not in _PACKINGS:
                method = f"packed by method {frame.compress_type}"
                detail = f"{self.name(place)}: {method}; expected 0 (stored) or 8 (deflated)"
                raise BadImageError(Reason.UNDECODABLE_FRAMES, detail)

    def _damaged(self, error: Exception, place: int | None = None) -> BadImageError:
        name = "" if place is None else f"{self.name(place)}: "
        detail = f"{name}{error or type(error).__name__}; a ZIP of {len(self._payload)} bytes"
        return BadImageError(Reason.UNDECODABLE_FRAMES, detail)
