import io
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from pipeline.data.media.image_check import BadImageError
from pipeline.data.media.video_file import opened_video, upright
from tests.vision.video_files import HEIGHT, WIDTH, boxed, video, with_cover, with_matrix


def first_frame(payload: bytes) -> np.ndarray:
    with opened_video(payload) as (container, stream):
        return upright(next(container.decode(stream)))


def size(payload: bytes) -> tuple[int, int]:
    with opened_video(payload) as (_, stream):
        return stream.width, stream.height


def test_the_cover_is_not_the_video() -> None:
    import av

    payload = with_cover(video(3))
    with av.open(io.BytesIO(payload)) as container:
        streams = [(stream.index, stream.codec_context.name) for stream in container.streams.video]
    assert streams == [(0, "mjpeg"), (1, "h264")]
    assert size(payload) == (WIDTH, HEIGHT)
    np.testing.assert_array_equal(first_frame(payload), first_frame(video(3)))


def two_streams(sizes: list[tuple[int, int, int]], form: str = "matroska") -> bytes:
    """Streams of these widths, heights and numbers of frames."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        streams: list[Any] = []
        for width, height, _ in sizes:
            stream: Any = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.time_base = Fraction(1, 10)
            streams.append(stream)
        for stream, (width, height, count) in zip(streams, sizes, strict=True):
            for _ in range(count):
                pixels = np.zeros((height, width, 3), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    return buffer.getvalue()


def test_of_several_videos_the_largest_is_shown_and_a_still_last() -> None:
    assert size(two_streams([(32, 16, 3), (64, 48, 3)])) == (64, 48)
    assert size(two_streams([(64, 48, 1), (32, 16, 3)], "mp4")) == (32, 16)


def test_a_file_that_holds_a_cover_alone_is_no_video() -> None:
    cover = with_cover(video(2), only=True)
    with pytest.raises(BadImageError, match="there is no video stream in it but its cover"):
        first_frame(cover)


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [  # a, b, c, d: x goes to a * x + c * y, and y to b * x + d * y
        ((1, 0, 0, 1), lambda pixels: pixels),
        ((0, 1, -1, 0), lambda pixels: np.rot90(pixels, -1)),
        ((-1, 0, 0, -1), lambda pixels: np.rot90(pixels, 2)),
        ((0, -1, 1, 0), np.rot90),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((0, 1, 1, 0), lambda pixels: pixels.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1)),
    ],
)
def test_frames_are_turned_and_mirrored_as_the_file_says(
    matrix: tuple[int, int, int, int], expected: Any
) -> None:
    payload = video(2, corner=True)  # no two of its turns look alike
    stored = first_frame(payload)
    np.testing.assert_array_equal(first_frame(with_matrix(payload, matrix)), expected(stored))


def test_words_about_a_video_that_are_no_utf8_do_not_matter() -> None:
    title = boxed(b"\xa9nam", boxed(b"data", bytes([0, 0, 0, 1, 0, 0, 0, 0]) + b"caf\xe9"))
    assert size(with_cover(video(2), title)) == (WIDTH, HEIGHT)


def test_damage_is_a_reason_and_words() -> None:
    whole = video(12)
    for at in range(8, len(whole), 41):
        payload = bytearray(whole)
        payload[at] ^= 0xFF
        try:
            first_frame(bytes(payload))
        except BadImageError as error:
            assert error.reason == "undecodable-video"  # noqa: PT017
        except StopIteration:
            continue
