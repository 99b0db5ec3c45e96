import io
import zipfile
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import check
from pipeline.errors import ConfigError, FeatureError
from pipeline.vision.preprocess.video import FramesConfig, choose, has_frames, read_frames
from pipeline.vision.preprocess.window import Window
from tests.vision.video_files import (
    HEIGHT,
    WIDTH,
    dicom,
    folder,
    frame,
    level,
    turned,
    video,
    with_cover,
)

EIGHT = FramesConfig(count=8)


def numbers(payload: bytes, config: FramesConfig) -> list[tuple[float, int]]:
    """Times of the frames that are read, and which ones they are by their brightness."""
    return [
        (seconds, round((float(pixels[:, 16:].mean()) - level(0)) / 6))
        for seconds, pixels in read_frames(payload, config)
    ]


@pytest.mark.parametrize("form", ["mp4", "webm"])
def test_a_count_takes_the_middle_of_equal_parts(form: str) -> None:
    found = numbers(video(30, form=form), FramesConfig(count=3))
    assert [number for _, number in found] == [5, 15, 25]
    assert [seconds for seconds, _ in found] == pytest.approx([0.5, 1.5, 2.5], abs=2e-3)


def test_a_rate_takes_the_frame_that_is_shown_at_each_time() -> None:
    found = numbers(video(30), FramesConfig(rate=4))
    assert [number for _, number in found] == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27]
    assert found[1][0] == pytest.approx(0.2)  # the frame's own time, not the one asked for


@pytest.mark.parametrize("key_frame_every", [1, 4, 100])
def test_frames_do_not_depend_on_where_key_frames_are(key_frame_every: int) -> None:
    payload = video(30, key_frame_every=key_frame_every)
    assert [number for _, number in numbers(payload, EIGHT)] == [1, 5, 9, 13, 16, 20, 24, 28]


def test_a_frame_is_near_to_what_was_encoded_and_the_same_each_time() -> None:
    payload = video(9)
    (first, again) = (read_frames(payload, FramesConfig(count=1))[0][1] for _ in range(2))
    assert first.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(first[:, 12:].astype(int) - frame(4)[:, 12:]).mean() < 3
    np.testing.assert_array_equal(first, again)


def test_a_turned_video_is_shown_upright() -> None:
    ((_, pixels),) = read_frames(turned(video(3)), FramesConfig(count=1))
    assert pixels.shape == (WIDTH, HEIGHT, 3)
    assert pixels[:6].mean() > 200  # the bar on the left has come to the top
    assert pixels[12:].mean() < 100


def test_a_folder_of_frames_has_the_stated_rate() -> None:
    config = FramesConfig(count=2, folder_rate=5)
    assert numbers(folder(10), config) == [(0.4, 2), (1.4, 7)]
    with pytest.raises(FeatureError, match=r"set extractor\.frames\.folder_rate"):
        read_frames(folder(2), EIGHT)


def test_frames_of_a_folder_are_in_the_order_of_their_numbers() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in (10, 11, 12, *range(1, 10)):
            png = io.BytesIO()
            Image.fromarray(frame(number)).save(png, "PNG")
            archive.writestr(f"clip/{number}.png", png.getvalue())
            archive.writestr(f"__MACOSX/clip/._{number}.png", b"no picture")
    found = numbers(buffer.getvalue(), FramesConfig(rate=1, folder_rate=1))
    assert found == [(float(number - 1), number) for number in range(1, 13)]


def test_a_frame_that_is_none_is_named() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("clip/7.png", b"words")
    with pytest.raises(FeatureError, match=r"folder of frames: clip/7\.png: not a usable image"):
        read_frames(buffer.getvalue(), FramesConfig(rate=1, folder_rate=1))


def test_the_frames_are_those_of_the_video_and_not_its_cover() -> None:
    assert numbers(with_cover(video(30)), EIGHT) == numbers(video(30), EIGHT)


def test_times_are_those_of_the_file_and_begin_at_0() -> None:
    stamps = [0, 50, 100, 150, 200, 1000, 2000, 3000, 4000, 5000]
    found = numbers(at_times([10_000 + stamp for stamp in stamps]), FramesConfig(rate=1))
    assert [number for _, number in found] == [0, 5, 6, 7, 8, 9]
    assert [seconds for seconds, _ in found] == pytest.approx([0, 1, 2, 3, 4, 5], abs=1e-3)


def at_times(milliseconds: list[int]) -> bytes:
    """A Matroska file whose frames begin at these times."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream: Any = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"crf": "10"}
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, stamp in enumerate(milliseconds):
            shown = av.VideoFrame.from_ndarray(frame(number), format="rgb24")
            shown.pts, shown.time_base = stamp, Fraction(1, 1000)
            container.mux(stream.encode(shown))
        container.mux(stream.encode())
    return buffer.getvalue()


def test_a_short_video_gives_each_frame_once() -> None:
    assert [number for _, number in numbers(video(3), EIGHT)] == [0, 1, 2]
    assert [number for _, number in numbers(video(1), EIGHT)] == [0]


@given(
    gaps=st.lists(st.floats(0.01, 2), max_size=30),
    count=st.integers(1, 20),
)
def test_chosen_frames_are_in_order_and_never_twice(gaps: list[float], count: int) -> None:
    times = [0.0, *np.cumsum(gaps).tolist()]
    for config in (FramesConfig(count=count), FramesConfig(rate=count / 4, most=4096)):
        places = choose(times, config)
        assert places == sorted(set(places))
        assert 0 <= places[0] <= places[-1] < len(times)
    assert len(choose(times, FramesConfig(count=count))) <= count


def test_more_frames_than_allowed_are_refused() -> None:
    with pytest.raises(
        FeatureError, match=r"30 frames at 10 a second; extractor\.frames\.most is 20"
    ):
        read_frames(video(30), FramesConfig(rate=10, most=20))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_damaged_video_is_refused(share: float) -> None:
    payload = video(20)
    with pytest.raises(FeatureError, match="video"):
        read_frames(payload[:8] + payload[8 : int(share * len(payload))], EIGHT)
    with pytest.raises(FeatureError, match="folder of frames"):
        read_frames(folder(3)[:90], FramesConfig(count=1, folder_rate=1))


@pytest.mark.parametrize("settings", [{}, {"count": 3, "rate": 1.0}])
def test_one_rule_is_given(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="either count or rate"):
        check(FramesConfig, settings, "recipe")


@pytest.mark.parametrize(
    ("stated", "seconds"),
    [({"FrameTime": 40}, 0.04), ({"CineRate": 10}, 0.1), ({}, 0.5)],  # else as folder_rate says
)
def test_a_dicom_of_several_images_is_a_video(stated: dict[str, float], seconds: float) -> None:
    values = np.stack([np.full((4, 6), level) for level in (0, 50, 100)])
    pixels = values.astype("<i2").tobytes()
    payload = dicom(values[0], NumberOfFrames=3, PixelData=pixels, **stated)
    window = Window(center=50.5, width=101)
    found = read_frames(payload, FramesConfig(count=3, folder_rate=2), window)
    assert [second for second, _ in found] == pytest.approx([0, seconds, 2 * seconds])
    assert [int(picture[0, 0, 0]) for _, picture in found] == [0, 128, 255]
    assert found[1][1].shape == (4, 6, 3)
    assert has_frames(payload)
    assert not has_frames(dicom(values[0]))
    if not stated:
        with pytest.raises(FeatureError, match=r"set extractor\.frames\.folder_rate"):
            read_frames(payload, FramesConfig(count=3), window)


def test_a_dicom_whose_images_begin_at_uneven_times_is_a_video_of_these() -> None:
    values = np.stack([np.full((4, 6), level) for level in (0, 50, 100)])
    pixels = values.astype("<i2").tobytes()
    payload = dicom(values[0], NumberOfFrames=3, PixelData=pixels, FrameTimeVector=[0, 200, 800])
    found = read_frames(payload, FramesConfig(rate=2), Window(center=50.5, width=101))
    assert [second for second, _ in found] == pytest.approx([0, 0.2, 1.0])
    assert [int(picture[0, 0, 0]) for _, picture in found] == [0, 128, 255]


def test_the_window_is_that_of_frames_too() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("0.dcm", dicom(np.array([[0, 50, 100]])))
    ((_, pixels),) = read_frames(
        buffer.getvalue(), FramesConfig(count=1, folder_rate=1), Window(center=50.5, width=101)
    )
    assert pixels[0, :, 0].tolist() == [0, 128, 255]
