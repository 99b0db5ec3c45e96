import io

import pytest
from PIL import Image

from pipeline.data.media.image_check import BadImageError, Verify, check_image


def encoded(form: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.effect_noise((37, 23), 90).convert(mode).save(file, form)
    return file.getvalue()


WHOLE = [
    ("JPEG", "RGB"),
    ("JPEG", "L"),
    ("JPEG", "CMYK"),
    ("PNG", "RGBA"),
    ("PNG", "P"),
    ("WEBP", "RGB"),
]


@pytest.mark.parametrize("verify", ["decode", "header"])
@pytest.mark.parametrize(("form", "mode"), WHOLE)
def test_whole_images_have_a_size(form: str, mode: str, verify: Verify) -> None:
    assert check_image(encoded(form, mode), verify) == (37, 23)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("cut", [30, 150, 300])
def test_images_cut_short_are_found_by_decoding(form: str, cut: int) -> None:
    with pytest.raises(BadImageError) as error:
        check_image(encoded(form)[:-cut], "decode")
    assert error.value.reason == "truncated-image"


@pytest.mark.parametrize("payload", [b"", b"<html>", b"\xff\xd8", bytes(100)])
def test_other_files_are_no_images(payload: bytes) -> None:
    with pytest.raises(BadImageError) as error:
        check_image(payload, "decode")
    assert error.value.reason == "not-an-image"
    assert error.value.detail


def test_an_image_of_absurd_size_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImageError) as error:
        check_image(encoded("PNG"), "decode")
    assert error.value.reason == "oversized-image"


def test_damage_within_a_png_is_found() -> None:
    payload = bytearray(encoded("PNG"))
    payload[60:90] = bytes(30)
    with pytest.raises(BadImageError) as error:
        check_image(bytes(payload), "decode")
    assert error.value.reason in ("truncated-image", "undecodable-image")
