"""Draws the pictures of this folder: coloured ground, things on it and grain, no photograph.

`python -m tests.pictures.draw` writes them again. They are the project's own, under its licence.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

FOLDER = Path(__file__).parent
SIZES = ((320, 240), (240, 320), (256, 256), (320, 200), (180, 320), (300, 225), (320, 240))
FORMS: tuple[dict[str, int | bool], ...] = (
    {},
    {"progressive": True},
    {"subsampling": 0},
    {"subsampling": 1},
    {"optimize": True},
    {"quality": 95},
    {"quality": 60},
)


def picture(number: int) -> Image.Image:
    """Returns a picture of a size, colours and things that follow from its number."""
    random = np.random.default_rng(number)
    width, height = SIZES[number % len(SIZES)]
    ground = Image.fromarray(random.integers(0, 256, (3, 4, 3), np.uint8))
    ground = ground.resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(ground)
    for _ in range(4):
        x, y = random.integers(0, width), random.integers(0, height)
        side = random.integers(width // 8, width // 3)
        colour = tuple(int(value) for value in random.integers(0, 256, 3))
        shape = (pen.ellipse, pen.rectangle)[random.integers(2)]
        shape((int(x), int(y), int(x + side), int(y + side)), fill=colour)
    grain = random.normal(0, 4.0, (height, width, 1))
    return Image.fromarray((np.asarray(ground) + grain).clip(0, 255).astype(np.uint8))


def main() -> None:
    for number, form in enumerate(FORMS):
        settings = {"quality": 88, **form}
        picture(number).save(FOLDER / f"picture-{number}.jpg", "JPEG", **settings)
    grey = picture(len(FORMS)).convert("L")
    grey.save(FOLDER / f"picture-{len(FORMS)}.jpg", "JPEG", quality=88)


if __name__ == "__main__":
    main()
