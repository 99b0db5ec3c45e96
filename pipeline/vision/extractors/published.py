"""Readers of files of published region features, one image at a time.

Read are the tables of bottom-up attention (image_id, image_w, image_h, num_boxes, boxes, features)
and of LXMERT (img_id, img_h, img_w, objects_id, objects_conf, attrs_id, attrs_conf, num_boxes,
boxes, features), whose arrays are base64; folders of .npz files, one for each image, as UNITER
(features, norm_bb, conf, soft_labels) or OpenVQA (x, bbox, image_w, image_h) have them; and VOLTA's
HDF5 files, which hold a group for each image. Nothing is unpickled.

An image whose arrays cannot be used costs that image: `cut-short`, `unreadable-features`,
`no-regions`, `not-finite`, `bad-boxes` (turned inside out, or beyond the picture), and
`contradictory-features` if a table has it twice and not alike.
"""

import base64
import binascii
import io
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline import storage
from pipeline.data.tars.member_names import is_hidden
from pipeline.digest import digest_of_file, digest_of_parts
from pipeline.errors import FeatureError, UnusableImageError
from pipeline.reason import Reason
from pipeline.vision.compress.storage_dtype import Storage, to_storage
from pipeline.vision.feature import Feature

_BOTTOM_UP = ("id", "width", "height", "num_boxes", "boxes", "features")
_LXMERT = (
    *("id", "height", "width", "objects", "object_scores", "attributes", "attribute_scores"),
    *("num_boxes", "boxes", "features"),
)
_BOX_VALUES = 4
_TABLE_TYPES = {"objects": np.int64, "attributes": np.int64}  # the rest is float32

# Names in .npz and HDF5 files to ours.
_NAMES = {
    "features": "features",
    "x": "features",
    "boxes": "boxes",
    "bbox": "boxes",
    "norm_bb": "fractions",
    "img_w": "width",
    "image_w": "width",
    "img_h": "height",
    "image_h": "height",
    "obj_id": "objects",
    "objects_id": "objects",
    "obj_conf": "object_scores",
    "objects_conf": "object_scores",
    "conf": "object_scores",
    "attr_id": "attributes",
    "attrs_id": "attributes",
    "attr_conf": "attribute_scores",
    "attrs_conf": "attribute_scores",
    "cls_prob": "classes",
    "soft_labels": "classes",
}
_PARTS: dict[str, tuple[str, Any]] = {
    "objects": ("labels", np.int32),
    "object_scores": ("scores", np.float32),
    "attributes": ("attribute.labels", np.int32),
    "attribute_scores": ("attribute.scores", np.float32),
    "classes": ("classes", np.float16),
}


Boxes = Literal["corners", "xywh"]  # x1, y1, x2, y2, or x, y, width, height
_OTHER: dict[Boxes, Boxes] = {"corners": "xywh", "xywh": "corners"}
_EDGE = 0.01  # of a side, by which detectors' rounded boxes may lie outside the picture
_MAX_IMAGE_BYTES = 1 << 28  # of the arrays of an image, unpacked


class PublishedFeatures(ABC):
    """Features of images by the ids that their publisher gave them."""

    layout: str
    digest: str  # of the content of all files
    num_repeated = 0  # lines of a table that say again what another has said

    @abstractmethod
    def ids(self) -> Sequence[str]:
        """Returns the id of every image."""

    @abstractmethod
    def fields(self, image_id: str) -> tuple[str, dict[str, Any]]:
        """Returns where an image's arrays were read, and the arrays by our names."""

    def read(self, image_id: str, stored: Storage, boxes: Boxes = "corners") -> Feature:
        """Returns values, boxes, and what else is published of the regions.

        Raises UnusableImageError, whose detail names the place.
        """
        where, fields = self.fields(image_id)
        where = f"{where}: image {image_id!r}"
        try:
            return _feature(fields, stored, boxes)
        except UnusableImageError as error:
            raise UnusableImageError(error.reason, f"{where}: {error.detail}") from error
        except (FeatureError, LookupError, TypeError, ValueError) as error:
            raise UnusableImageError(Reason.UNREADABLE_FEATURES, f"{where}: {error!r}") from error

    def is_only(self, image_ids: Iterable[str], boxes: Boxes) -> bool:
        """Whether all boxes of some images that can be read are of a form, and of no other."""
        is_of, is_of_others = True, True
        for image_id in image_ids:
            try:
                _, fields = self.fields(image_id)
                if "fractions" in fields:
                    return boxes == "corners"
                is_of &= not _faults(_corners(fields, boxes))
                is_of_others &= not _faults(_corners(fields, _OTHER[boxes]))
            except (FeatureError, LookupError, TypeError, ValueError):
                continue
        return is_of and not is_of_others


def open_published(location: str) -> PublishedFeatures:
    """Opens a .tsv or .h5 file or a folder of .npz files; FeatureError if it is none of these."""
    path = storage.local_path(storage.absolute(location))
    if path.is_dir():
        return _NpzFolder(path)
    if not path.is_file():
        raise FeatureError(f"{location}: no such file or folder")
    if path.suffix == ".tsv":
        return _Table(path)
    if path.suffix in (".h5", ".hdf5"):
        return _Hdf5(path)
    raise FeatureError(f"{location}: expected .tsv, .h5 or a folder of .npz files")


class _Table(PublishedFeatures):
    """One pass finds the lines; after that each is one read, whatever the size of the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: dict[str, tuple[int, int, int]] = {}  # number, first byte, bytes
        self._contents: dict[str, int] = {}  # a hash of each line
        self._contradicted: dict[str, int] = {}  # the number of the line that does
        hasher = xxhash.xxh3_128()
        offset, columns = 0, Counter[int]()
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                hasher.update(line)
                name = line[:200].split(b"\t", 1)[0].decode("utf-8", "replace")
                if name not in ("img_id", "image_id") and line.strip():
                    columns[line.count(b"\t") + 1] += 1
                    content = xxhash.xxh3_64_intdigest(line.strip())
                    if name not in self._lines:
                        self._lines[name] = (number, offset, len(line))
                        self._contents[name] = content
                    elif content == self._contents[name]:
                        self.num_repeated += 1
                    else:
                        self._contradicted[name] = number
                offset += len(line)
        self.digest = hasher.hexdigest()
        known = {len(_BOTTOM_UP): _BOTTOM_UP, len(_LXMERT): _LXMERT}
        num_columns = columns.most_common(1)[0][0] if columns else 0
        if num_columns not in known:
            raise FeatureError(
                f"{path}: expected {len(_BOTTOM_UP)} columns (bottom-up attention) or "
                f"{len(_LXMERT)} (LXMERT), found {num_columns}"
            )
        self._columns = known[num_columns]
        self.layout = "bottom-up attention" if self._columns is _BOTTOM_UP else "LXMERT"

    def ids(self) -> Sequence[str]:
        return list(self._lines)

    def fields(self, image_id: str) -> tuple[str, dict[str, Any]]:
        number, offset, size_bytes = self._lines[image_id]
        where = f"{self._path}: line {number}"
        if image_id in self._contradicted:
            detail = (
                f"{where}: image {image_id!r}: otherwise in line {self._contradicted[image_id]}"
            )
            raise UnusableImageError(Reason.CONTRADICTORY_FEATURES, detail)
        line = storage.read_range(str(self._path), offset, size_bytes)
        cells = line.rstrip(b"\r\n").split(b"\t")
        if len(cells) != len(self._columns):
            detail = f"{where}: {len(cells)} columns, expected {len(self._columns)}"
            raise UnusableImageError(Reason.CUT_SHORT, detail)
        fields: dict[str, Any] = {}
        for name, cell in zip(self._columns, cells, strict=True):
            try:
                if name == "id":
                    continue
                if name in ("width", "height", "num_boxes"):
                    fields[name] = int(cell)
                else:
                    payload = base64.b64decode(cell, validate=True)
                    fields[name] = np.frombuffer(payload, _TABLE_TYPES.get(name, np.float32))
            except (ValueError, binascii.Error) as error:
                raise UnusableImageError(Reason.CUT_SHORT, f"{where}: {name}: {error}") from error
        count = fields.pop("num_boxes")
        if not count:
            raise UnusableImageError(
                Reason.NO_REGIONS, f"{where}: image {image_id!r}: num_boxes is 0"
            )
        for name in ("boxes", "features"):
            if count < 0 or not fields[name].size or fields[name].size % count:
                raise UnusableImageError(
                    Reason.CUT_SHORT,
                    f"{where}: {name}: {fields[name].size} values for {count} boxes",
                )
            fields[name] = fields[name].reshape(count, -1)
        if fields["boxes"].shape[1] != _BOX_VALUES:
            detail = f"{where}: boxes of {fields['boxes'].shape[1]} values, expected {_BOX_VALUES}"
            detail += " in float32"
            raise UnusableImageError(Reason.UNREADABLE_FEATURES, detail)
        return where, fields


class _NpzFolder(PublishedFeatures):
    layout = "npz"

    def __init__(self, path: Path) -> None:
        self._paths = {
            file.stem: file for file in sorted(path.glob("*.npz")) if not is_hidden(file.name)
        }
        if not self._paths:
            raise FeatureError(f"{path}: no .npz files in this folder")
        self.digest = digest_of_parts(
            part
            for name, file in self._paths.items()
            for part in (f"{name}\n".encode(), file.read_bytes())
        )

    def ids(self) -> Sequence[str]:
        return list(self._paths)

    def fields(self, image_id: str) -> tuple[str, dict[str, Any]]:
        path = self._paths[image_id]
        try:
            payload = path.read_bytes()
            with zipfile.ZipFile(io.BytesIO(payload)) as archive:
                size_bytes = sum(member.file_size for member in archive.infolist())
            if size_bytes > _MAX_IMAGE_BYTES:
                raise ValueError(f"{size_bytes:,} bytes unpacked, more than {_MAX_IMAGE_BYTES:,}")
            with np.load(io.BytesIO(payload), allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files if name in _NAMES}
        except Exception as error:  # readers of damaged archives let many kinds through
            raise UnusableImageError(Reason.UNREADABLE_FEATURES, f"{path}: {error!r}") from error
        return str(path), _renamed(arrays)


class _Hdf5(PublishedFeatures):
    layout = "VOLTA"

    def __init__(self, path: Path) -> None:
        try:
            import h5py
        except ImportError as error:
            raise FeatureError(f"{path}: HDF5 files need h5py: pip install h5py") from error
        self._path = path
        self.digest = digest_of_file(path)
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            raise FeatureError(f"{path}: cannot be read: {error}") from error

    def ids(self) -> Sequence[str]:
        return list(self._file)

    def fields(self, image_id: str) -> tuple[str, dict[str, Any]]:
        try:
            group = self._file[image_id]
            sizes = [group[name].nbytes for name in group if name in _NAMES]
            if sum(sizes) > _MAX_IMAGE_BYTES:
                raise ValueError(f"{sum(sizes):,} bytes, more than {_MAX_IMAGE_BYTES:,}")
            arrays = {name: group[name][()] for name in group if name in _NAMES}
        except Exception as error:  # of damage, too, the library lets many kinds through
            detail = f"{self._path}: image {image_id!r}: {error!r}"
            raise UnusableImageError(Reason.UNREADABLE_FEATURES, detail) from error
        return str(self._path), _renamed(arrays)


def _renamed(arrays: Mapping[str, Any]) -> dict[str, Any]:
    fields = {_NAMES[name]: np.asarray(array) for name, array in arrays.items()}
    if "x" in arrays and "boxes" in fields and len(fields["features"]) != len(fields["boxes"]):
        fields["features"] = fields["features"].T  # OpenVQA: (2048, R)
    return fields


def _corners(fields: Mapping[str, Any], form: Boxes) -> npt.NDArray[np.float64]:
    """Returns the boxes (R, 4) as x1, y1, x2, y2 in fractions of width and height."""
    if "fractions" in fields:  # UNITER's and VOLTA's are known to be corners
        return np.asarray(fields["fractions"], np.float64)[:, :4]
    width, height = float(fields["width"]), float(fields["height"])
    boxes = np.asarray(fields["boxes"], np.float64)[:, :4]
    if form == "xywh":
        boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        corners: npt.NDArray[np.float64] = boxes / np.array([width, height, width, height])
    return corners


def _faults(boxes: npt.NDArray[np.float64]) -> str:
    """Says which box is none, of some in fractions; nothing if all are boxes of the picture."""
    inside = (boxes >= -_EDGE) & (boxes <= 1 + _EDGE)
    good = np.isfinite(boxes).all(1) & inside.all(1) & (boxes[:, 2:] >= boxes[:, :2]).all(1)
    if good.all():
        return ""
    first = int(np.argmin(good))
    found = ", ".join(f"{value:.3f}" for value in boxes[first])
    return (
        f"box {first} from x1, y1 to x2, y2 in shares of width and height: {found}; expected "
        "x1 <= x2 and y1 <= y2, from 0 to 1"
    )


def _feature(fields: Mapping[str, Any], stored: Storage, form: Boxes) -> Feature:
    import torch

    values = np.asarray(fields["features"], np.float32)
    if values.ndim != 2:
        raise FeatureError(f"features: expected (regions, values), found shape {values.shape}")
    if not len(values):
        raise UnusableImageError(Reason.NO_REGIONS, f"features of shape {values.shape}")
    if not np.isfinite(values).all():
        raise UnusableImageError(
            Reason.NOT_FINITE, f"features: {int((~np.isfinite(values)).sum())} values"
        )
    corners = _corners(fields, form)
    if corners.shape != (len(values), 4):
        raise FeatureError(f"boxes of shape {corners.shape} for {len(values)} regions")
    if fault := _faults(corners):
        raise UnusableImageError(Reason.BAD_BOXES, fault)
    boxes = np.clip(corners, 0, 1).astype(np.float32)
    parts = {}
    for name, (part, dtype) in _PARTS.items():
        if name in fields:
            array = np.asarray(fields[name]).astype(dtype)
            if name != "classes":
                array = array.reshape(-1)
            if len(array) != len(values):
                raise FeatureError(f"{name}: {len(array)} of them for {len(values)} regions")
            parts[part] = array
    (converted,) = to_storage(torch.tensor(values).unsqueeze(0), stored)
    return Feature(converted.values, boxes, parts, quantized=converted.quantized)
