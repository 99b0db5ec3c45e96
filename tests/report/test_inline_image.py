import io

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import FeatureError
from pipeline.report.inline_image import inline_image, shared_ratio, still, thumbnail
from pipeline.vision.preprocess.window import Window
from tests.report.conftest import png
from tests.vision.video_files import dicom, level, video


def test_a_thumbnail_is_a_small_jpeg_of_the_same_proportions() -> None:
    shown = Image.open(io.BytesIO(thumbnail(png(900, 600), max_side=300)))
    assert (shown.format, shown.size) == ("JPEG", (300, 200))


def test_a_small_picture_is_not_enlarged() -> None:
    shown = inline_image(thumbnail(png(31, 17)))
    assert (shown.width, shown.height) == (31, 17)
    assert shown.url.startswith("data:image/jpeg;base64,")


def test_bytes_that_are_no_image_are_refused() -> None:
    with pytest.raises(FeatureError, match="image"):
        thumbnail(b"not an image")


def test_every_picture_of_a_gallery_fits_its_box_whole() -> None:
    pictures = [inline_image(thumbnail(png(*size))) for size in [(40, 30), (30, 40), (90, 30)]]
    ratio = shared_ratio(pictures)
    for shown in pictures:
        width = shown.fit(ratio)
        height = width / shown.width * shown.height * ratio  # in percent of the box's height
        assert width <= 100
        assert height <= 100.001
        assert max(width, height) == pytest.approx(100)
    assert shared_ratio([]) == 1


def test_a_video_is_shown_by_its_middle_frame_and_a_scan_by_a_window() -> None:
    assert abs(float(still(video(9))[:, 16:].mean()) - level(4)) < 4
    values = np.array([[0, 500, 1000]], np.int16)
    stated = dicom(values, WindowCenter=500, WindowWidth=1000)
    assert still(stated)[0, :, 0].tolist() == [0, 128, 255]
    assert still(stated, Window(center=0, width=2))[0, :, 0].tolist() == [255, 255, 255]
