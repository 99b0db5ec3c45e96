"""Made-up JPEG files that weigh and compress as photographs do."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

WIDTH, HEIGHT = 640, 480  # as most of COCO
THUMBNAIL = 64, 48
_PATCHES = (15, 20, 3)  # of colour
_GRAIN = 3.0  # of 255


def draw(folder: Path, num_images: int, quality: int) -> None:
    """Writes the files, and `captions.json`, which has one caption for each in COCO's form.

    Of JPEG quality 88 a file has 60 KB, of 97 about 150, as those of COCO have on average.
    """
    folder.mkdir(parents=True, exist_ok=True)
    grain = np.random.default_rng(0).normal(0, _GRAIN, (HEIGHT, WIDTH, 1)).astype(np.float32)
    images = []
    for number in range(num_images):
        name = f"{number:012d}.jpg"
        (folder / name).write_bytes(_photograph(number, grain, quality))
        images.append({"id": number, "file_name": name})
    captions = [
        {"id": number, "image_id": number, "caption": f"A picture of number {number} in colour."}
        for number in range(num_images)
    ]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))


def thumbnail() -> bytes:
    """Returns a small JPEG, for rows whose pictures are not what is measured."""
    random = np.random.default_rng(0)
    patches = Image.fromarray(random.integers(0, 256, _PATCHES, np.uint8))
    small = np.asarray(patches.resize(THUMBNAIL, Image.Resampling.BICUBIC))
    encoded: bytes = simplejpeg.encode_jpeg(small, 85, "RGB", "420")
    return encoded


def _photograph(seed: int, grain: npt.NDArray[np.float32], quality: int) -> bytes:
    random = np.random.default_rng(seed)
    patches = Image.fromarray(random.integers(0, 256, _PATCHES, np.uint8))
    smooth = np.asarray(patches.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    pixels = (smooth + np.roll(grain, seed, axis=1)).clip(0, 255).astype(np.uint8)
    encoded: bytes = simplejpeg.encode_jpeg(pixels, quality, "RGB", "420")
    return encoded
