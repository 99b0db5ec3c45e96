"""File kinds by their first bytes, where they decide how a file is read."""

_ZIPS = (b"PK\x03\x04", b"PK\x05\x06")  # the second is that of one without a file
_MATROSKA = b"\x1a\x45\xdf\xa3"  # of WebM too
_MEDIA_AT, _MEDIA = 4, b"ftyp"  # of mp4 and QuickTime, and of pictures with these brands:
_PICTURE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
_DICOM_AT, _DICOM = 128, b"DICM"


def is_picture(payload: bytes) -> bool:
    """Whether these are not the bytes of a video, a folder of frames or a DICOM file."""
    return not (is_video(payload) or is_dicom(payload))


def is_video(payload: bytes) -> bool:
    """Whether these are the bytes of an mp4, a WebM, or a folder of frames in a ZIP."""
    if payload[_MEDIA_AT : _MEDIA_AT + len(_MEDIA)] == _MEDIA:
        brand = payload[_MEDIA_AT + 4 : _MEDIA_AT + 8]
        return brand not in _PICTURE_BRANDS
    return payload.startswith(_MATROSKA) or is_zip(payload)


def is_zip(payload: bytes) -> bool:
    """Whether these are the bytes of a folder of frames."""
    return payload.startswith(_ZIPS)


def is_dicom(payload: bytes) -> bool:
    """Whether these are the bytes of a DICOM file."""
    return payload[_DICOM_AT : _DICOM_AT + len(_DICOM)] == _DICOM
