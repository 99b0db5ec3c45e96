"""A DICOM file and its images: colours as they are, other values in the modality's units.

Each image of an enhanced multi-frame file has the rescaling and the window that its own functional
group states, else the shared one's, else the file's. Palette indices are looked up. What is
unpacked is bounded. Memory: the file, and one image.
"""

import contextlib
import io
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.media.image_file import BadImageError, max_pixels
from pipeline.data.media.unpacking import most_bytes
from pipeline.reason import Reason

Values = npt.NDArray[Any]  # (height, width), or uint8 RGB (height, width, 3)

GREY = ("MONOCHROME1", "MONOCHROME2")
_PALETTE = "PALETTE COLOR"
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "YBR_PARTIAL_420")
_COLOUR_NAMES = ("Red", "Green", "Blue")

_META_BEGINS = 132  # behind a preamble and four letters
_META_GROUP = b"\x02\x00"
_LONG_KINDS = (b"OB", b"OW", b"OF", b"OD", b"OL", b"SQ", b"UC", b"UN", b"UR", b"UT")
_DEFLATED = b"1.2.840.10008.1.2.1.99"  # of a transfer syntax, as the next one
_EXPLICIT = b"1.2.840.10008.1.2.1".ljust(len(_DEFLATED), b"\0")


class DicomFile:
    """A DICOM, whose values are read when they are asked for.

    Whatever is wrong with it raises BadImageError: `undecodable-dicom`, `unsupported-pixels` or
    `oversized-image`. Raises ImportError without pydicom.
    """

    def __init__(self, payload: bytes, header_only: bool = False) -> None:
        import pydicom

        self._size_bytes = len(payload)
        with self._faults_as_reasons():
            file = io.BytesIO(_inflated(payload))
            self._dataset = pydicom.dcmread(file, stop_before_pixels=header_only)
            self.width, self.height = int(self._dataset.Columns), int(self._dataset.Rows)
            self.num_images = int(self._dataset.get("NumberOfFrames") or 1)
            self.photometry = str(self._dataset.PhotometricInterpretation)
            self._require_bounds()

    def images(self, places: Sequence[int] | None = None) -> Iterator[Values]:
        """Yields these images, or all: RGB, or a modality's values."""
        from pydicom.pixels.utils import iter_pixels

        wanted = list(range(self.num_images) if places is None else places)
        with self._faults_as_reasons():
            stored = iter_pixels(self._dataset, indices=wanted)
        for place in wanted:
            with self._faults_as_reasons():
                image = self._image(next(stored), place)
            yield image

    def times(self) -> list[float] | None:
        """Returns the seconds at which images begin, the first at 0; None if it does not say."""
        with self._faults_as_reasons():
            dataset = self._dataset
            gaps = dataset.get("FrameTimeVector")  # milliseconds since the image before
            if gaps is not None and len(gaps) == self.num_images > 1:
                times: list[float] = (np.cumsum([0.0, *map(float, gaps[1:])]) / 1000).tolist()
                return times
            seconds = float(dataset.get("FrameTime") or 0) / 1000
            rate = dataset.get("CineRate") or dataset.get("RecommendedDisplayFrameRate")
            if not seconds and rate:
                seconds = 1 / float(rate)
            return [place * seconds for place in range(self.num_images)] if seconds else None

    def stated_window(self, place: int) -> tuple[float | None, float | None, str]:
        """Returns the first window that is stated for an image: center, width and function."""
        with self._faults_as_reasons():
            stated = self._of_image(place, "FrameVOILUTSequence")
            center, width = (_first(stated.get(f"Window{name}")) for name in ("Center", "Width"))
            return center, width, str(stated.get("VOILUTFunction") or "LINEAR")

    def _image(self, stored: Values, place: int) -> Values:
        from pydicom.pixels.processing import apply_modality_lut, apply_rescale

        if self.photometry in GREY:
            if stored.ndim != 2:
                raise BadImageError(Reason.UNSUPPORTED_PIXELS, f"grey of shape {stored.shape}")
            if self._dataset.get("ModalityLUTSequence"):
                units: Values = apply_modality_lut(stored, self._dataset)
            else:
                stated = self._of_image(place, "PixelValueTransformationSequence")
                units = apply_rescale(stored, stated)
            return units
        if self.photometry == _PALETTE:
            return self._looked_up(stored)
        if stored.ndim != 3 or stored.shape[2] != 3:
            detail = f"{self.photometry} of shape {stored.shape}"
            raise BadImageError(Reason.UNSUPPORTED_PIXELS, f"{detail}; expected three colours")
        if stored.dtype == np.uint8:
            return stored
        return _to_eight_bits(stored, int(self._dataset.BitsStored))

    def _of_image(self, place: int, macro: str) -> Any:
        """Returns what states something of an image: its functional group, or the file."""
        groups = []
        of_each = self._dataset.get("PerFrameFunctionalGroupsSequence") or ()
        if place < len(of_each):
            groups.append(of_each[place])
        groups += (self._dataset.get("SharedFunctionalGroupsSequence") or ())[:1]
        for group in groups:
            if items := group.get(macro):
                return items[0]
        return self._dataset

    def _looked_up(self, indices: Values) -> Values:
        """Returns the colours of a palette's indices (PS3.3, C.7.6.3.1.5 and 6)."""
        dataset = self._dataset
        count, first, bits = map(int, dataset.RedPaletteColorLookupTableDescriptor)
        count = count or 65536
        if "RedPaletteColorLookupTableData" in dataset:
            columns = [self._palette(name, count, bits) for name in _COLOUR_NAMES]
            table = np.stack(columns, axis=1)
        else:
            table = self._unfolded_palette(first, count, bits)
        colours: Values = table[(indices.astype(np.int64) - first).clip(0, count - 1)]
        return colours

    def _palette(self, colour: str, count: int, bits: int) -> Values:
        entries = self._dataset[f"{colour}PaletteColorLookupTableData"].value
        if len(entries) < 2 * count:
            return np.frombuffer(entries, np.uint8, count)
        return _to_eight_bits(np.frombuffer(entries, "<u2", count), bits)

    def _unfolded_palette(self, first: int, count: int, bits: int) -> Values:
        """Returns the colours of a palette that is written in segments."""
        from pydicom.pixels.processing import apply_color_lut

        if count > 2**bits:  # which it counts in too few bits
            raise BadImageError(
                Reason.UNSUPPORTED_PIXELS, f"a palette of {count} colours in segments"
            )
        table = apply_color_lut(np.arange(first, first + count), self._dataset)
        return _to_eight_bits(table[:, : len(_COLOUR_NAMES)], bits)

    def _require_bounds(self) -> None:
        samples = int(self._dataset.get("SamplesPerPixel") or 1)
        size = self.width * self.height * samples * -(-int(self._dataset.BitsAllocated) // 8)
        most = most_bytes(self._size_bytes)
        if self.photometry not in (*GREY, _PALETTE, *_COLOURS):
            raise BadImageError(Reason.UNSUPPORTED_PIXELS, f"colours of the kind {self.photometry}")
        if min(self.width, self.height, self.num_images) < 1:
            detail = f"{self.num_images} images of {self.width} x {self.height} pixels"
            raise BadImageError(Reason.UNDECODABLE_DICOM, detail)
        if size * self.num_images > most or self.width * self.height > max_pixels():
            raise BadImageError(
                Reason.OVERSIZED_IMAGE,
                f"{self.num_images} images of {self.width} x {self.height} pixels in a file of "
                f"{self._size_bytes} bytes; the most are {most} bytes",
            )

    @contextlib.contextmanager
    def _faults_as_reasons(self) -> Iterator[None]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd values that stop nobody from seeing it
                yield
        except BadImageError:
            raise
        except Exception as error:  # readers let many kinds through on damaged files
            detail = f"{type(error).__name__}: {error}; {self._size_bytes} bytes"
            raise BadImageError(Reason.UNDECODABLE_DICOM, detail) from error


def _inflated(payload: bytes) -> bytes:
    """Returns a file that was deflated as a plain one, which pydicom would do without a bound."""
    start = _meta_end(payload)
    header = payload[:start]
    if _DEFLATED not in header:
        return payload
    most = most_bytes(len(payload))
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = unpacker.decompress(payload[start:], most)
    if unpacker.unconsumed_tail:
        raise BadImageError(Reason.OVERSIZED_IMAGE, f"more than {most} bytes when it is inflated")
    if not unpacker.eof:
        raise EOFError("deflated, and cut short")
    return header.replace(_DEFLATED, _EXPLICIT) + inflated


def _meta_end(payload: bytes) -> int:
    """Returns where the elements end that say how the others are written (PS3.10, 7.1)."""
    at = _META_BEGINS
    while payload[at : at + 2] == _META_GROUP:
        is_long = payload[at + 4 : at + 6] in _LONG_KINDS
        length = slice(at + 8, at + 12) if is_long else slice(at + 6, at + 8)
        at = length.stop + int.from_bytes(payload[length], "little")
    return at


def _to_eight_bits(values: Values, bits: int) -> Values:
    shares = values.astype(np.float32) / (2**bits - 1)
    levels: Values = (255 * shares.clip(0, 1)).round().astype(np.uint8)
    return levels


def _first(value: Any) -> float | None:
    """Returns the first of several values: files may state one window for bone, one for tissue."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if value else None
    return None if value is None else float(value)
