"""Bounds on what is unpacked from a file: a few megabytes may hold as many gigabytes."""

_MOST_ADDED_BYTES = 2 * 1024**3  # beyond the size of the file
_MOST_RATIO = 200  # to the size of the file; pictures hardly become smaller
_UNSUSPECTED_BYTES = 256 * 1024**2  # whatever the ratio: blank ones pack well


def most_bytes(packed_bytes: int) -> int:
    """Returns how many bytes may be unpacked from a file of this size, all in all."""
    wide = max(_UNSUSPECTED_BYTES, _MOST_RATIO * packed_bytes)
    return min(packed_bytes + _MOST_ADDED_BYTES, wide)
