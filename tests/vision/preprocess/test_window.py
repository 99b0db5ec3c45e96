import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from pipeline.errors import FeatureError
from pipeline.vision.preprocess.image import Resize, decode, describe
from pipeline.vision.preprocess.video import FramesConfig, read_frames
from pipeline.vision.preprocess.window import Window, apply_window
from tests.vision.video_files import dicom

VALUES = np.array([[-1000, -160, 40], [239, 240, 3000]], np.int16)  # 2 rows, 3 columns
TISSUE = Window(center=40, width=400)


def grey(payload: bytes, window: Any) -> list[list[int]]:
    pixels = decode(payload, window)
    assert pixels.dtype == np.uint8
    assert (pixels == pixels[:, :, :1]).all()
    found: list[list[int]] = pixels[:, :, 0].tolist()
    return found


def test_values_within_the_window_become_grey_and_others_black_or_white() -> None:
    assert apply_window(VALUES, TISSUE).tolist() == [[0, 0, 128], [255, 255, 255]]
    step = apply_window(np.arange(-160, 240), TISSUE).astype(int)
    assert (np.diff(step) >= 0).all()
    assert (step[0], step[-1]) == (0, 255)


def test_windowing_is_that_of_pydicom() -> None:
    from pydicom.pixels.processing import apply_windowing

    values = np.arange(0, 4096, 7).astype(np.uint16)
    dataset = Dataset()
    dataset.WindowCenter, dataset.WindowWidth = 1500, 900
    dataset.BitsStored, dataset.PixelRepresentation = 8, 0
    dataset.PhotometricInterpretation = "MONOCHROME2"
    expected = np.rint(apply_windowing(values, dataset))
    found = apply_window(values, Window(center=1500, width=900))
    np.testing.assert_array_equal(found, expected)


def test_a_dicom_is_rescaled_to_its_units_before_the_window() -> None:
    payload = dicom((VALUES + 1024) // 2, RescaleSlope=2, RescaleIntercept=-1024)
    found = grey(payload, TISSUE)
    assert found[0] == [0, 0, 128]
    assert found[1][2] == 255


def test_each_image_of_an_enhanced_file_has_its_own_units_and_window() -> None:
    groups = []
    for slope, center in ((1, 40), (2, 1000)):
        units, view, of_image = Dataset(), Dataset(), Dataset()
        units.RescaleSlope, units.RescaleIntercept = slope, -1024
        view.WindowCenter, view.WindowWidth = center, 400
        of_image.PixelValueTransformationSequence = Sequence([units])
        of_image.FrameVOILUTSequence = Sequence([view])
        groups.append(of_image)
    values = np.stack([VALUES + 1024, (VALUES + 1024) // 2])
    payload = dicom(
        values, Rows=2, Columns=3, NumberOfFrames=2, FrameTime=100,
        PerFrameFunctionalGroupsSequence=Sequence(groups),
    )  # fmt: skip
    (_, first), (_, second) = read_frames(payload, FramesConfig(count=2), TISSUE)
    assert first[:, :, 0].tolist() == grey(dicom(VALUES), TISSUE)
    assert second[0, :, 0].tolist() == [0, 0, 128]
    (_, first), (_, second) = read_frames(payload, FramesConfig(count=2), "stored")
    assert first[:, :, 0].tolist() == grey(dicom(VALUES), TISSUE)
    assert second[:, :, 0].tolist() == [[0, 0, 0], [0, 0, 255]]


def test_a_palette_is_looked_up_and_never_windowed() -> None:
    indices = np.array([[0, 1, 2]])
    tables: dict[str, Any] = {}
    for name, entries in (("Red", [0, 255, 0]), ("Green", [0, 0, 255]), ("Blue", [9, 0, 0])):
        tables[f"{name}PaletteColorLookupTableDescriptor"] = [3, 0, 8]
        tables[f"{name}PaletteColorLookupTableData"] = bytes([*entries, 0])
    payload = dicom(
        indices, PhotometricInterpretation="PALETTE COLOR", PixelRepresentation=0, **tables
    )
    for window in (None, TISSUE, "stored"):
        assert decode(payload, window).tolist() == [[[0, 0, 9], [255, 0, 0], [0, 255, 0]]]


def test_the_window_that_a_file_states_is_used_if_asked_for() -> None:
    stated = dicom(VALUES, WindowCenter=[40, 300], WindowWidth=[400, 2000])
    assert grey(stated, "stored") == grey(stated, TISSUE)
    with pytest.raises(FeatureError, match="without a linear window of its own"):
        decode(dicom(VALUES), "stored")
    with pytest.raises(FeatureError, match="without a linear window of its own"):
        sigmoid = {"WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": "SIGMOID"}
        decode(dicom(VALUES, **sigmoid), "stored")


def test_a_dicom_is_never_windowed_by_a_guess() -> None:
    with pytest.raises(FeatureError, match=r"extractor\.window is not given"):
        decode(dicom(VALUES, WindowCenter=40, WindowWidth=400))


def test_monochrome1_is_turned_over() -> None:
    inverted = np.array(grey(dicom(VALUES, PhotometricInterpretation="MONOCHROME1"), TISSUE))
    np.testing.assert_array_equal(255 - inverted, grey(dicom(VALUES), TISSUE))


def test_damaged_and_many_framed_dicoms_are_refused() -> None:
    with pytest.raises(FeatureError, match=r"not a usable image: [a-z-]+: a DICOM image"):
        decode(dicom(VALUES)[:-6], TISSUE)
    several = np.zeros((4, 2, 3), np.int16)
    payload = dicom(several, Rows=2, Columns=3, NumberOfFrames=4)
    with pytest.raises(FeatureError, match="a DICOM of 4 images"):
        decode(payload, TISSUE)


def test_sixteen_bit_pictures_follow_the_window_and_others_do_not() -> None:
    tones = np.array([[0, 1000, 40000]], np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(tones).save(buffer, "PNG")
    assert grey(buffer.getvalue(), Window(center=1000, width=2000)) == [[0, 128, 255]]
    assert grey(buffer.getvalue(), None) == [[0, 4, 156]]
    eight = io.BytesIO()
    Image.fromarray((tones // 256).astype(np.uint8)).save(eight, "PNG")
    assert grey(eight.getvalue(), TISSUE) == grey(eight.getvalue(), None)


def test_a_window_is_a_step_of_its_own_and_none_leaves_the_card_as_it_was() -> None:
    steps = (Resize(8),)
    assert describe(steps, None) == describe(steps)
    named = [describe(steps, window)[1] for window in (TISSUE, Window(center=41, width=400))]
    assert named[0] != named[1]
    assert named[0]["center"] == 40
    assert describe(steps, "stored")[1]["window"] == "stored"
