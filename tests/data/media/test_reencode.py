import io

import pytest
from PIL import Image

from pipeline.data.media.image_check import BadImageError
from pipeline.data.media.reencode import ReencodeConfig, reencode
from tests.data.album import encoded, picture


def opened(payload: bytes) -> Image.Image:
    return Image.open(io.BytesIO(payload))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_any_image_becomes_an_upright_jpeg_without_metadata(form: str) -> None:
    stored = reencode(encoded(picture(1, 90, 60), form), ReencodeConfig(shorter_side=30))
    image = opened(stored.payload)
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (45, 30))
    assert (stored.width, stored.height) == image.size
    assert not image.getexif()
    assert "icc_profile" not in image.info


def test_the_same_file_and_settings_give_the_same_bytes() -> None:
    payload, config = encoded(picture(1), "JPEG"), ReencodeConfig(shorter_side=20)
    assert reencode(payload, config) == reencode(payload, config)


def test_quality_decides_the_size() -> None:
    payload = encoded(picture(1, 200, 150))
    fine, coarse = (len(reencode(payload, ReencodeConfig(quality=q)).payload) for q in (95, 30))
    assert coarse < fine / 2


def test_a_turned_picture_is_stored_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = reencode(encoded(picture(1, 90, 60), "JPEG", exif=exif), ReencodeConfig())
    assert (stored.width, stored.height) == opened(stored.payload).size == (60, 90)


def test_animated_images_are_kept_as_their_first_frame_or_refused() -> None:
    frames = {"save_all": True, "append_images": [picture(2)]}
    payload = encoded(picture(1), "GIF", **frames)
    assert opened(reencode(payload, ReencodeConfig()).payload).size == (48, 32)
    with pytest.raises(BadImageError) as error:
        reencode(payload, ReencodeConfig(animated="reject"))
    assert error.value.reason == "animated-image"
