"""An image to 64 bits of which few differ between pictures that look alike.

The hash is `imagehash.phash`: signs of the 8 x 8 lowest frequencies of the luminance at 32 x 32.
"""

import numpy as np
from PIL import Image

from pipeline.data.image_pixels import upright_srgb

_DECODED_SIDE = 64  # pixels; twice what the hash looks at


def perceptual_hash(payload: bytes) -> int:
    """Returns the hash of an image file, as a signed number of 64 bits.

    It is of the picture as it is seen: neither a turn by EXIF nor a colour profile makes another
    picture of it. Raises BadImageError.
    """
    import imagehash  # brings scipy, which takes a while

    picture = Image.fromarray(upright_srgb(payload, _DECODED_SIDE))
    bits = imagehash.phash(picture).hash
    return int(np.packbits(bits).view(">i8")[0])
