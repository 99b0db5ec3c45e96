"""Small real videos and DICOM images, written by the libraries that read them."""

import io
import zipfile
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 48, 32


def level(number: int) -> int:
    """How bright the frame of this number is."""
    return 16 + 6 * number


def frame(number: int) -> np.ndarray:
    """A frame whose brightness says which one it is, with a white bar on its left."""
    pixels = np.full((HEIGHT, WIDTH, 3), level(number), np.uint8)
    pixels[:, :8] = 250
    return pixels


def video(
    count: int,
    rate: int = 10,
    form: str = "mp4",
    key_frame_every: int = 8,
    corner: bool = False,
) -> bytes:
    """Encodes `count` frames: H.264 in mp4, VP8 in webm. A `corner` is grey, the left upper one."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream: Any = container.add_stream({"mp4": "libx264", "webm": "libvpx"}[form], rate=rate)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.gop_size = key_frame_every
        stream.options = {"crf": "10", "b": "2M"}
        for number in range(count):
            pixels = frame(number)
            if corner:
                pixels[:12, :8] = 128
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def turned(payload: bytes) -> bytes:
    """Sets the matrix of an mp4's track to a quarter turn clockwise, as phones do."""
    return with_matrix(payload, (0, 1, -1, 0))


def with_matrix(payload: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """Sets the matrix of an mp4's track: a, b, c and d, without the shift that goes with them."""
    at = payload.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    written = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4").tobytes()
    return payload[:at] + written + payload[at + len(written) :]


def boxed(kind: bytes, content: bytes) -> bytes:
    """Returns a box of an mp4."""
    return (len(content) + 8).to_bytes(4, "big") + kind + content


def with_cover(payload: bytes, *others: bytes, only: bool = False) -> bytes:
    """Puts a cover before the tracks of an mp4, as iTunes does; `only`: the tracks are gone."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(picture, "JPEG")
    cover = boxed(b"covr", boxed(b"data", bytes([0, 0, 0, 13, 0, 0, 0, 0]) + picture.getvalue()))
    handler = boxed(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    listed = boxed(b"ilst", cover + b"".join(others))
    added = boxed(b"udta", boxed(b"meta", bytes(4) + handler + listed))
    at = payload.index(b"moov") - 4  # behind the frames, which stay where they are
    end = at + int.from_bytes(payload[at : at + 4], "big")
    header = at + 8 + int.from_bytes(payload[at + 8 : at + 12], "big")
    tracks = b"" if only else payload[header:end]
    return payload[:at] + boxed(b"moov", payload[at + 8 : header] + added + tracks) + payload[end:]


def folder(count: int) -> bytes:
    """A ZIP of PNG frames, not in the order of their names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in reversed(range(count)):
            png = io.BytesIO()
            Image.fromarray(frame(number)).save(png, "PNG")
            archive.writestr(f"clip/{number:04d}.png", png.getvalue())
    return buffer.getvalue()


def dicom(values: np.ndarray, **attributes: Any) -> bytes:
    """Writes grey int16 values as a CT image; attributes are added or replaced."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    dataset.Modality, dataset.PhotometricInterpretation = "CT", "MONOCHROME2"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = *values.shape[:2], 1
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 1
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
    dataset.PixelData = values.astype("<i2").tobytes()
    for name, value in attributes.items():
        setattr(dataset, name, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
