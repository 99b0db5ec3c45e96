import io
import zipfile

import numpy as np
import pytest

from pipeline.data.ingest.filters import FilterConfig
from pipeline.data.ingest.image_policy import ImagePolicy
from pipeline.data.media.image_check import BadImageError, Verify
from pipeline.data.media.media_check import check_media
from pipeline.data.media.perceptual_hash import perceptual_hash
from pipeline.data.media.reencode import ReencodeConfig
from tests.vision.photo_dataset import picture
from tests.vision.video_files import HEIGHT, WIDTH, dicom, folder, video, with_cover

SCAN = dicom(np.arange(60).reshape(6, 10))
SCANS = dicom(np.zeros((6, 10)), NumberOfFrames=3, PixelData=np.arange(180, dtype="<i2").tobytes())


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, payload in files.items():
            archive.writestr(name, payload)
    return buffer.getvalue()


@pytest.mark.parametrize("verify", ["decode", "header"])
@pytest.mark.parametrize(
    ("payload", "size"),
    [
        (video(12), (WIDTH, HEIGHT)),
        (video(12, form="webm"), (WIDTH, HEIGHT)),
        (folder(3), (WIDTH, HEIGHT)),
        (zipped(a=SCAN, b=SCAN), (10, 6)),
        (SCAN, (10, 6)),
        (SCANS, (10, 6)),
        (with_cover(video(12)), (WIDTH, HEIGHT)),
        (
            zipped(**{"a/1.png": picture(1), "__MACOSX/a/._1.png": b"no", ".DS_Store": b"no"}),
            (32, 23),
        ),
        (picture(1), (32, 23)),
    ],
)
def test_whole_files_have_a_size(payload: bytes, size: tuple[int, int], verify: Verify) -> None:
    assert check_media(payload, verify) == size


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (video(40)[:-300], "undecodable-video"),  # an mp4 has its index at the end
        (video(40)[:20], "undecodable-video"),
        (video(40, form="webm")[: len(video(40, form="webm")) // 2], "truncated-video"),
        (video(40, form="webm")[:200], "undecodable-video"),
        (folder(3)[:-30], "undecodable-frames"),
        (zipped(), "no-frames"),
        (zipped(a=picture(1), b=picture(2)[:-80]), "truncated-image"),
        (zipped(a=video(2)), "undecodable-frames"),
        (zipped(a=b"words"), "not-an-image"),
        (zipped(a=picture(1), b=folder(2)), "undecodable-frames"),
        (zipped(a=SCANS), "undecodable-frames"),
        (with_cover(video(2), only=True), "undecodable-video"),
        (dicom(np.zeros((2, 3)), PhotometricInterpretation="HSV"), "unsupported-pixels"),
        (dicom(np.zeros((2, 3)), PhotometricInterpretation="PALETTE COLOR"), "undecodable-dicom"),
        (SCAN[:-20], "undecodable-dicom"),
        (SCAN[:200], "undecodable-dicom"),
        (b"", "not-an-image"),
        (b"words", "not-an-image"),
    ],
)
def test_files_cut_short_and_empty_ones_are_found_by_decoding(payload: bytes, reason: str) -> None:
    with pytest.raises(BadImageError) as error:
        check_media(payload, "decode")
    assert error.value.reason == reason
    assert error.value.detail


def test_an_mp4_whose_end_is_missing_behind_its_index_is_cut_short() -> None:
    payload = video(39, key_frame_every=4)
    index = payload.index(b"moov") - 4
    size = int.from_bytes(payload[index : index + 4], "big")
    first = payload[: payload.index(b"mdat") - 4]
    fast = first + payload[index : index + size]  # as `faststart` lays it, offsets aside
    media = payload[len(first) : index]
    moved = bytearray(fast + media)
    at = moved.index(b"stco") + 8
    count = int.from_bytes(moved[at : at + 4], "big")
    for chunk in range(count):
        place = at + 4 + 4 * chunk
        offset = int.from_bytes(moved[place : place + 4], "big") + size
        moved[place : place + 4] = offset.to_bytes(4, "big")
    assert check_media(bytes(moved), "decode") == (WIDTH, HEIGHT)
    with pytest.raises(BadImageError) as error:
        check_media(bytes(moved[: len(fast) + len(media) // 2]), "decode")
    assert error.value.reason == "truncated-video"


def test_videos_and_dicom_are_stored_as_they_came_and_filtered_by_their_size() -> None:
    policy = ImagePolicy(reencode=ReencodeConfig(shorter_side=8))
    for payload in (video(3), folder(2), SCAN):
        assert policy.apply(payload).payload == payload
    assert [policy.suffix(suffix) for suffix in ("png", "mp4", "dcm")] == ["jpg", "mp4", "dcm"]
    small = ImagePolicy(filters=FilterConfig(min_shorter_side=20))
    assert small.apply(video(3)).height == HEIGHT
    with pytest.raises(BadImageError, match="too-small"):
        small.apply(SCAN)


def test_a_video_looks_like_none_but_itself() -> None:
    payload = folder(3)
    assert perceptual_hash(payload) == perceptual_hash(payload)
    assert perceptual_hash(payload) != perceptual_hash(folder(4))
