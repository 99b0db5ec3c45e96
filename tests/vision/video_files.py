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


def video(count: int, rate: int = 10, form: str = "mp4", key_frame_every: int = 8) -> bytes:
    """Encodes `count` frames: H.264 in mp4, VP8 in webm."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream: Any = container.add_stream({"mp4": "libx264", "webm": "libvpx"}[form], rate=rate)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.gop_size = key_frame_every
        stream.options = {"crf": "10", "b": "2M"}
        for number in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame(number), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def turned(payload: bytes) -> bytes:
    """Sets the matrix of an mp4's track to a quarter turn clockwise, as phones do."""
    at = payload.index(b"tkhd") + 44
    one = 1 << 16
    matrix = np.array([0, one, 0, -one, 0, 0, HEIGHT * one, 0, 1 << 30], ">i4").tobytes()
    return payload[:at] + matrix + payload[at + len(matrix) :]


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
