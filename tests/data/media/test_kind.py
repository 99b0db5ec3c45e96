import io

import numpy as np
from PIL import Image

from pipeline.data.media.kind import is_dicom, is_video
from tests.vision.photo_dataset import picture
from tests.vision.video_files import dicom, folder, video


def test_videos_and_dicoms_are_told_by_their_first_bytes() -> None:
    videos = [video(1), video(1, form="webm"), folder(1)]
    scan = dicom(np.zeros((2, 3)))
    assert all(map(is_video, videos))
    assert not any(map(is_dicom, videos))
    assert is_dicom(scan)
    assert not any(map(is_video, (picture(0), scan, b"")))


def test_a_picture_in_a_container_of_videos_is_a_picture() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "AVIF")
    assert buffer.getvalue()[4:8] == b"ftyp"
    assert not is_video(buffer.getvalue())
