import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline.data.media.image_pixels import Pixels
from pipeline.errors import FeatureError, UnusableImageError
from pipeline.vision.preprocess.image import (
    CentreCrop,
    PaddedCentreCrop,
    Resize,
    ResizeBicubic,
    ResizeShortSide,
    ResizeShortSideTo,
    ResizeWithin,
    decode,
    describe,
    prepare,
)

WHOLE = (0.0, 0.0, 1.0, 1.0)


def gradient(width: int = 7, height: int = 5) -> Image.Image:
    across = np.linspace(20, 230, width).astype(np.uint8)
    down = np.linspace(10, 200, height).astype(np.uint8)
    red, green = (
        np.broadcast_to(across, (height, width)),
        np.broadcast_to(down[:, None], (height, width)),
    )
    return Image.fromarray(np.stack([red, green, np.full_like(red, 90)], axis=2))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_orientation(image: Image.Image, kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_is_turned_as_its_exif_tag_says(kind: str, orientation: int) -> None:
    payload = with_orientation(gradient(), kind, orientation)
    untagged = Image.open(io.BytesIO(encode(gradient(), kind))).convert("RGB")
    untagged.getexif()[0x0112] = orientation
    np.testing.assert_array_equal(decode(payload), np.asarray(ImageOps.exif_transpose(untagged)))


def test_broken_exif_turns_nothing() -> None:
    payload = encode(gradient(), "JPEG", exif=b"Exif\x00\x00nonsense")
    np.testing.assert_array_equal(decode(payload), decode(encode(gradient(), "JPEG")))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_fast_jpeg_path_gives_exactly_what_pillow_gives(
    mode: str, subsampling: int, progressive: bool
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    payload = encode(
        Image.fromarray(noise).convert(mode),
        "JPEG",
        quality=70,
        subsampling=subsampling,
        progressive=progressive,
    )
    expected = np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"))
    np.testing.assert_array_equal(decode(payload), expected)


def test_fast_jpeg_path_gives_exactly_what_pillow_gives_on_photographs(
    photographs: list[Path],
) -> None:
    for path in photographs:
        expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        np.testing.assert_array_equal(decode(path.read_bytes()), expected, err_msg=path.name)


def test_cmyk_jpeg_keeps_its_colours() -> None:
    payload = encode(gradient(64, 48).convert("CMYK"), "JPEG", quality=95)
    difference = decode(payload).astype(int) - np.asarray(gradient(64, 48)).astype(int)
    assert np.abs(difference).mean() < 3


def test_grey_becomes_three_equal_channels() -> None:
    pixels = decode(encode(gradient().convert("L"), "PNG"))
    assert pixels.shape == (5, 7, 3)
    assert (pixels[:, :, 0] == pixels[:, :, 1]).all()
    assert (pixels[:, :, 0] == pixels[:, :, 2]).all()


def test_palette_gives_its_colours() -> None:
    palette = gradient().quantize(64)
    np.testing.assert_array_equal(
        decode(encode(palette, "PNG")), np.asarray(palette.convert("RGB"))
    )


def test_bilevel_is_black_and_white() -> None:
    assert set(np.unique(decode(encode(gradient().convert("1"), "PNG")))) == {0, 255}


def test_transparent_pixels_show_white() -> None:
    image = gradient().convert("RGBA")
    image.putpixel((3, 2), (255, 0, 0, 0))
    image.putpixel((4, 2), (0, 0, 0, 128))
    pixels = decode(encode(image, "PNG"))
    assert pixels[2, 3].tolist() == [255, 255, 255]
    assert 125 <= pixels[2, 4, 0] <= 129
    np.testing.assert_array_equal(pixels[0], np.asarray(gradient())[0])


def test_transparent_palette_entry_shows_white() -> None:
    image = Image.new("P", (4, 3))
    image.putpalette([200, 10, 10, 10, 10, 200])
    image.putpixel((1, 2), 1)
    pixels = decode(encode(image, "PNG", transparency=0))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[2, 1].tolist() == [10, 10, 200]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_keeps_its_tones(kind: str) -> None:
    tones = np.array([[0, 255, 256], [32768, 65279, 65535]], np.uint16)
    pixels = decode(encode(Image.fromarray(tones), kind))
    assert pixels[:, :, 1].tolist() == [[0, 1, 1], [128, 254, 255]]


def test_floating_point_image_is_refused() -> None:
    with pytest.raises(FeatureError, match="32 bits a channel"):
        decode(encode(Image.fromarray(np.zeros((2, 3), np.float32)), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_truncated_image_is_refused(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    payload = encode(Image.fromarray(noise), kind)
    with pytest.raises(FeatureError, match="not a usable image"):
        decode(payload[: int(share * len(payload))])


@settings(max_examples=50, deadline=None)
@given(place=st.integers(0, 400), junk=st.binary(min_size=1, max_size=20))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF"])
@pytest.mark.filterwarnings("ignore")  # Pillow warns about some of the damage
def test_damaged_bytes_give_pixels_or_a_feature_error(kind: str, place: int, junk: bytes) -> None:
    payload = encode(gradient(40, 30), kind)
    damaged = payload[:place] + junk + payload[place + len(junk) :]
    try:
        pixels = decode(damaged)
    except FeatureError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3


@pytest.mark.parametrize(("width", "height"), [(97, 61), (61, 97), (80, 80)])
def test_short_side_and_crop_are_those_of_torchvision(width: int, height: int) -> None:
    from torchvision.transforms import CenterCrop as TorchCrop
    from torchvision.transforms import Compose
    from torchvision.transforms import Resize as TorchResize

    image = gradient(width, height)
    expected = Compose([TorchResize(33), TorchCrop(24)])(image)
    found = prepare(encode(image, "PNG"), (ResizeShortSide(33), CentreCrop(24)))
    np.testing.assert_array_equal(found.pixels, np.asarray(expected))


def test_view_says_which_part_of_the_picture_was_kept() -> None:
    pixels: Pixels = np.zeros((20, 40, 3), np.uint8)
    assert Resize(10)(pixels, WHOLE)[1] == WHOLE
    kept, view = CentreCrop(10)(pixels, WHOLE)
    assert kept.shape == (10, 10, 3)
    assert view == pytest.approx((15 / 40, 5 / 20, 25 / 40, 15 / 20))


def test_every_step_is_described_with_its_settings() -> None:
    described = describe((ResizeShortSide(33), CentreCrop(24)))
    assert [step["step"] for step in described] == [
        "decode",
        "resize the short side, antialiased bilinear",
        "centre crop",
    ]
    assert described[1]["size"] == 33


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (640, 480, (1067, 800)),
        (480, 640, (800, 1067)),
        (1000, 300, (1333, 400)),  # the long side decides
        (1600, 1200, (1067, 800)),
        (3000, 1, (1333, 1)),
    ],
)
def test_a_detector_sees_the_short_side_at_its_size_within_the_long_one(
    width: int, height: int, expected: tuple[int, int]
) -> None:
    pixels = np.zeros((height, width, 3), np.uint8)
    found, view = ResizeWithin(800, 1333)(pixels, (0.0, 0.0, 1.0, 1.0))
    assert found.shape[1::-1] == expected
    assert view == (0.0, 0.0, 1.0, 1.0)


def test_the_cubic_filter_gives_the_same_size_and_other_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    view = (0.0, 0.0, 1.0, 1.0)
    for linear, cubic in (
        (Resize(20), ResizeBicubic(20)),
        (ResizeShortSide(20), ResizeShortSideTo(20, "BICUBIC")),
    ):
        a, b = linear(pixels, view)[0], cubic(pixels, view)[0]
        assert a.shape == b.shape
        assert (a != b).any()


def test_a_picture_that_would_grow_without_bound_is_refused() -> None:
    line = encode(Image.new("RGB", (65_000, 1)), "PNG")
    with pytest.raises(UnusableImageError, match="65000 × 1 pixels would become") as caught:
        prepare(line, (ResizeShortSide(224),))
    assert caught.value.reason == "oversized-image"
    assert pickle.loads(pickle.dumps(caught.value)).reason == "oversized-image"


def test_a_crop_beyond_the_picture_is_padded_and_odd_rests_are_rounded_down() -> None:
    pixels = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
    kept, view = PaddedCentreCrop(2)(pixels, WHOLE)
    np.testing.assert_array_equal(kept, pixels[1:3, 1:3])
    np.testing.assert_allclose(view, (1 / 4, 1 / 5, 3 / 4, 3 / 5))
    kept, view = PaddedCentreCrop(6)(pixels, WHOLE)
    np.testing.assert_array_equal(kept[1:, 1:5], pixels)
    assert not kept[0].any()
    assert not kept[:, [0, 5]].any()
    np.testing.assert_allclose(view, (-1 / 4, -1 / 5, 5 / 4, 1))
