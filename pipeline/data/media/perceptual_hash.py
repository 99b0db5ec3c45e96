"""The perceptual hash: 64 bits of which few differ between pictures that look alike.

The hash is `imagehash.phash`: signs of the 8 x 8 lowest frequencies of the luminance at 32 x 32.
"""

import numpy as np
import xxhash
from PIL import Image

from pipeline.data.media.image_pixels import upright_srgb
from pipeline.data.media.kind import is_picture

_DECODED_SIDE = 64  # pixels; twice what the hash looks at


def perceptual_hash(payload: bytes) -> int:
    """Returns the hash of an image file, as a signed number of 64 bits.

    It is of the picture as it is seen: neither a turn by EXIF nor a colour profile makes another
    picture of it. A video or a DICOM looks like none but itself: its hash is that of its bytes.
    Raises BadImageError.
    """
    if not is_picture(payload):
        return int.from_bytes(xxhash.xxh3_64_digest(payload), "big", signed=True)
    import imagehash  # brings scipy, which takes a while

    picture = Image.fromarray(upright_srgb(payload, _DECODED_SIDE))
    bits = imagehash.phash(picture).hash
    return int(np.packbits(bits).view(">i8")[0])
