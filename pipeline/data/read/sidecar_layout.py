"""The layout of a sidecar: where it holds each array of a sample's features.

The manifest lists where the values lie. The other arrays of a sample stand beside them in the
order of their names, and the card gives their shapes, so that their places follow.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.lib.format as npy
import numpy.typing as npt

from pipeline.data.read.extractor_card import PartLayout, read_card
from pipeline.data.tars.members import Int64Array

BLOCK_BYTES = 512  # of a tar: a member's header is one, and its payload ends on one


_BOXES = PartLayout.of("float32", "R", 4)


@dataclass(frozen=True)
class SidecarLayout:
    """What a sidecar holds of each sample besides values and boxes."""

    arrays: Mapping[str, PartLayout] = field(default_factory=dict)
    segments: bool = False  # masks, last of all: their size differs from sample to sample

    def places(
        self,
        values_offset: Int64Array,
        values_size: Int64Array,
        num_regions: npt.NDArray[np.int32],
        with_boxes: bool,
    ) -> dict[str, tuple[Int64Array, Int64Array]]:
        """Returns offset and size in bytes of every part; those of `segments` have size 0."""
        sizes = {
            f"{name}.npy": _payload_sizes(part, num_regions)
            for name, part in self._with_boxes(with_boxes)
        }
        if self.segments:
            sizes["segments.json"] = np.zeros_like(values_size)
        places: dict[str, tuple[Int64Array, Int64Array]] = {}
        header = values_offset - BLOCK_BYTES
        for suffix in sorted((name for name in sizes if name < "npy"), reverse=True):
            offset = header - _padded(sizes[suffix])
            places[_name(suffix)] = (offset, sizes[suffix])
            header = offset - BLOCK_BYTES
        end = values_offset + _padded(values_size)
        for suffix in sorted(name for name in sizes if name > "npy"):
            offset = end + BLOCK_BYTES
            places[_name(suffix)] = (offset, sizes[suffix])
            end = offset + _padded(sizes[suffix])
        return places

    def _with_boxes(self, with_boxes: bool) -> list[tuple[str, PartLayout]]:
        return [*self.arrays.items(), *([("boxes", _BOXES)] if with_boxes else [])]


def card_layout(url: str, extractor: str) -> SidecarLayout:
    """Reads the layout from an extractor's card; values and boxes alone if there is none."""
    card = read_card(url, extractor)
    return SidecarLayout() if card is None else SidecarLayout(card.parts, bool(card.segments))


def _payload_sizes(part: PartLayout, num_regions: npt.NDArray[np.int32]) -> Int64Array:
    """Returns the bytes of the .npy payload for every sample."""
    counts, place = np.unique(num_regions, return_inverse=True)
    return np.array([_payload_size(part, count) for count in counts.tolist()], np.int64)[place]


def _payload_size(part: PartLayout, count: int) -> int:
    shape = tuple(count if length == "R" else length for length in part.shape)
    header = io.BytesIO()
    described = {"descr": npy.dtype_to_descr(np.dtype(part.dtype)), "shape": shape}
    npy.write_array_header_1_0(header, described | {"fortran_order": False})
    return header.tell() + int(np.prod(shape)) * np.dtype(part.dtype).itemsize


def _padded(size_bytes: Int64Array) -> Int64Array:
    return size_bytes + -size_bytes % BLOCK_BYTES


def _name(suffix: str) -> str:
    return suffix.rpartition(".")[0]
