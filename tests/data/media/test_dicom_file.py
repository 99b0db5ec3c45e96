import io
import zlib
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from pipeline.data.media.dicom_file import DicomFile
from pipeline.data.media.image_check import BadImageError
from tests.data.media.test_frame_zip import measured
from tests.vision.video_files import dicom

VALUES = np.arange(24, dtype=np.int16).reshape(4, 2, 3)  # 4 images of 2 rows, 3 columns
MANY = {"Rows": 2, "Columns": 3, "NumberOfFrames": 4}
EXPLICIT, DEFLATED = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"


def item(**attributes: Any) -> Dataset:
    dataset = Dataset()
    for name, value in attributes.items():
        setattr(dataset, name, Sequence(value) if isinstance(value, list) else value)
    return dataset


def rescaled(slope: float, intercept: float) -> Dataset:
    return item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="HU")


def group(slope: float, intercept: float, center: float, width: float) -> Dataset:
    """A functional group of an enhanced multi-frame CT or PET."""
    return item(
        PixelValueTransformationSequence=[rescaled(slope, intercept)],
        FrameVOILUTSequence=[item(WindowCenter=center, WindowWidth=width)],
    )


def palette(indices: np.ndarray, first: int = 0, bits: int = 16, **attributes: Any) -> bytes:
    """Indices of a palette that goes from red to blue."""
    count = 300 if bits == 16 else 200
    ramp = np.arange(count)
    scale = 65535 if bits == 16 else 255
    form = "<u2" if bits == 16 else "u1"
    colours = {"Red": scale * (1 - ramp / (count - 1)), "Green": 0 * ramp, "Blue": scale * ramp / (count - 1)}  # fmt: skip  # noqa: E501
    tables: dict[str, Any] = {}
    for name, values in colours.items():
        tables[f"{name}PaletteColorLookupTableDescriptor"] = [count, first, bits]
        tables[f"{name}PaletteColorLookupTableData"] = np.rint(values).astype(form).tobytes()
    unsigned = {"PixelRepresentation": 0, "PhotometricInterpretation": "PALETTE COLOR"}
    return dicom(indices, **unsigned, **tables, **attributes)


def images(payload: bytes) -> list[Any]:
    return [values.tolist() for values in DicomFile(payload).images()]


def reason(payload: bytes) -> str:
    with pytest.raises(BadImageError) as error:
        list(DicomFile(payload).images())
    return error.value.reason


def test_each_image_has_the_units_that_its_own_group_states() -> None:
    groups = [group(place + 1, -100 * place, 40 + place, 400) for place in range(4)]
    payload = dicom(VALUES, **MANY, PerFrameFunctionalGroupsSequence=Sequence(groups))
    file = DicomFile(payload)
    for place, values in enumerate(file.images()):
        np.testing.assert_array_equal(values, VALUES[place] * (place + 1) - 100 * place)
        assert file.stated_window(place) == (40 + place, 400, "LINEAR")
    (last,) = file.images([3])
    np.testing.assert_array_equal(last, VALUES[3] * 4 - 300)


def test_what_no_image_states_is_shared_and_else_the_files() -> None:
    shared = Sequence([group(2, 5, 7, 80)])
    stated = {"RescaleSlope": 9, "RescaleIntercept": 9, "WindowCenter": 1, "WindowWidth": 2}
    payload = dicom(VALUES, **MANY, **stated, SharedFunctionalGroupsSequence=shared)
    np.testing.assert_array_equal(images(payload), VALUES * 2 + 5)
    assert DicomFile(payload).stated_window(2) == (7, 80, "LINEAR")
    others = Sequence([item(PixelValueTransformationSequence=[rescaled(3, 1)])] * 4)
    payload = dicom(
        VALUES, **MANY, **stated, SharedFunctionalGroupsSequence=shared,
        PerFrameFunctionalGroupsSequence=others,
    )  # fmt: skip
    np.testing.assert_array_equal(images(payload), VALUES * 3 + 1)
    assert DicomFile(payload).stated_window(2) == (7, 80, "LINEAR")
    np.testing.assert_array_equal(images(dicom(VALUES, **MANY, **stated)), VALUES * 9 + 9)


@pytest.mark.parametrize("bits", [8, 16])
def test_indices_of_a_palette_are_its_colours(bits: int) -> None:
    last = 299 if bits == 16 else 199
    indices = np.array([[0, last, 5], [last + 9, 100, 0]])  # what is beyond the last is the last
    (found,) = images(palette(indices, bits=bits))
    shares = np.minimum(indices, last) / last
    expected = np.stack([255 * (1 - shares), 0 * shares, 255 * shares], -1)
    np.testing.assert_allclose(found, expected, atol=1)
    assert found[0] == [[255, 0, 0], [0, 0, 255], found[0][2]]
    (shifted,) = images(palette(indices + 1000, first=1000, bits=bits))
    assert shifted == found


def test_colours_of_a_palette_are_those_of_pydicom() -> None:
    from pydicom import dcmread
    from pydicom.pixels.processing import apply_color_lut

    indices = np.arange(300).reshape(10, 30)
    payload = palette(indices)
    expected = apply_color_lut(indices.astype(np.uint16), dcmread(io.BytesIO(payload)))
    np.testing.assert_allclose(images(payload)[0], expected / 257, atol=0.5)


def test_a_palette_may_be_written_in_segments() -> None:
    ramp = np.rint(np.linspace(0, 65535, 5)).astype("<u2")
    tables: dict[str, Any] = {}
    for name, values in (("Red", ramp), ("Green", 0 * ramp), ("Blue", ramp[::-1])):
        segment = np.array([0, len(values), *values], "<u2")  # of as many values, one by one
        tables[f"{name}PaletteColorLookupTableDescriptor"] = [5, 10, 16]
        tables[f"Segmented{name}PaletteColorLookupTableData"] = segment.tobytes()
    colours = {"PhotometricInterpretation": "PALETTE COLOR", "PixelRepresentation": 0}
    assert images(dicom(np.array([[9, 10, 12, 14, 99]]), **colours, **tables)) == [
        [[[0, 0, 255], [0, 0, 255], [128, 0, 128], [255, 0, 0], [255, 0, 0]]]
    ]


def test_colours_of_more_bits_become_eight() -> None:
    colours = np.array([[[0, 2047, 4095], [4095, 0, 1]]])
    attributes = {
        "SamplesPerPixel": 3,
        "PlanarConfiguration": 0,
        "PhotometricInterpretation": "RGB",
    }
    payload = dicom(colours, **attributes, PixelRepresentation=0, BitsStored=12, HighBit=11)
    assert images(payload) == [[[[0, 127, 255], [255, 0, 0]]]]


def test_images_begin_when_the_file_says() -> None:
    uneven = dicom(VALUES, **MANY, FrameTimeVector=[0, 50, 100, 1000])
    assert DicomFile(uneven).times() == pytest.approx([0, 0.05, 0.15, 1.15])
    assert DicomFile(dicom(VALUES, **MANY, CineRate=4)).times() == [0, 0.25, 0.5, 0.75]
    assert DicomFile(dicom(VALUES, **MANY)).times() is None


def deflated(payload: bytes) -> bytes:
    """The same file as one that is deflated behind its header."""
    from pydicom import dcmread

    dataset = dcmread(io.BytesIO(payload))
    buffer = io.BytesIO()
    dataset.file_meta.TransferSyntaxUID = DEFLATED
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def test_a_deflated_file_is_read_as_the_plain_one_is() -> None:
    payload = dicom(VALUES, **MANY)
    packed = deflated(payload)
    assert DEFLATED.encode() in packed
    assert images(packed) == images(payload)
    assert reason(packed[:-30]) == "undecodable-dicom"


@pytest.mark.processes
def test_a_deflated_bomb_costs_little_memory_and_one_record() -> None:
    whole = dicom(np.zeros((2, 2), np.int16))
    meta = deflated(whole)
    start = 144 + int.from_bytes(meta[140:144], "little")
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    piece = packer.compress(bytes(1024**2)) + packer.flush(zlib.Z_FULL_FLUSH)
    bomb = meta[:start] + piece * 3000 + packer.flush(zlib.Z_FINISH)  # 3 GB
    assert len(bomb) < 4 * 1024**2
    said, added = measured(bomb)
    assert said == "oversized-image"
    assert added < 1024**3


@pytest.mark.processes
def test_a_size_that_the_file_cannot_have_is_found_before_memory_is_taken() -> None:
    said, added = measured(dicom(VALUES[0], Rows=60000, Columns=60000, NumberOfFrames=9))
    assert said == "oversized-image"
    assert added < 64 * 1024**2


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"PhotometricInterpretation": "HSV"}, "unsupported-pixels"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "undecodable-dicom"),
        ({"Rows": 0}, "undecodable-dicom"),
        ({"SamplesPerPixel": 3, "Columns": 1, "PlanarConfiguration": 0}, "unsupported-pixels"),
        ({"NumberOfFrames": 5}, "undecodable-dicom"),
    ],
)
def test_what_cannot_be_shown_has_a_reason(attributes: dict[str, Any], expected: str) -> None:
    assert reason(dicom(VALUES[0], **attributes)) == expected


def test_damage_anywhere_is_a_reason() -> None:
    whole = palette(np.arange(24).reshape(4, 6))
    for at in range(0, len(whole) - 40, 7):
        payload = bytearray(whole)
        payload[at] ^= 1 << at % 8
        try:
            list(DicomFile(bytes(payload)).images())
        except BadImageError as error:
            assert error.detail  # noqa: PT017
