"""Files of published region features to features, one image at a time.

Read are the tables of bottom-up attention (image_id, image_w, image_h, num_boxes, boxes, features)
and of LXMERT (img_id, img_h, img_w, objects_id, objects_conf, attrs_id, attrs_conf, num_boxes,
boxes, features), whose arrays are base64; folders of .npz files, one for each image, as UNITER
(features, norm_bb, conf, soft_labels) or OpenVQA (x, bbox, image_w, image_h) have them; and VOLTA's
HDF5 files, which hold a group for each image. Nothing is unpickled.
"""

import base64
import binascii
import io
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pipeline import storage
from pipeline.errors import FeatureError
from pipeline.vision.feature import Feature
from pipeline.vision.packing import Storage, pack

_BOTTOM_UP = ("id", "width", "height", "num_boxes", "boxes", "features")
_LXMERT = (
    *("id", "height", "width", "objects", "object_scores", "attributes", "attribute_scores"),
    *("num_boxes", "boxes", "features"),
)
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


class PublishedFeatures(ABC):
    """Features of images by the ids that their publisher gave them."""

    layout: str
    digest: str  # of the content of all files

    @abstractmethod
    def ids(self) -> Sequence[str]:
        """Returns the id of every image."""

    @abstractmethod
    def fields(self, image_id: str) -> tuple[str, dict[str, Any]]:
        """Returns where an image's arrays were read, and the arrays by our names."""

    def read(self, image_id: str, stored: Storage) -> Feature:
        """Returns values, boxes, and what else is published of the regions.

        Raises FeatureError, naming the place, if arrays are absent, cut short or not finite.
        """
        where, fields = self.fields(image_id)
        try:
            return _feature(fields, stored)
        except (FeatureError, KeyError, ValueError) as error:
            raise FeatureError(f"{where}: image {image_id!r}: {error}") from error


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
        hasher = xxhash.xxh3_128()
        offset, columns = 0, 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                hasher.update(line)
                name = line[:200].split(b"\t", 1)[0].decode("utf-8", "replace")
                if name not in ("img_id", "image_id") and line.strip():
                    columns = columns or line.count(b"\t") + 1
                    if name in self._lines:
                        first = self._lines[name][0]
                        raise FeatureError(f"{path}: image {name!r}: in lines {first} and {number}")
                    self._lines[name] = (number, offset, len(line))
                offset += len(line)
        self.digest = hasher.hexdigest()
        known = {len(_BOTTOM_UP): _BOTTOM_UP, len(_LXMERT): _LXMERT}
        if columns not in known:
            raise FeatureError(
                f"{path}: expected {len(_BOTTOM_UP)} columns (bottom-up attention) or "
                f"{len(_LXMERT)} (LXMERT), found {columns}"
            )
        self._columns = known[columns]
        self.layout = "bottom-up attention" if self._columns is _BOTTOM_UP else "LXMERT"

    def ids(self) -> Sequence[str]:
        return list(self._lines)

    def fields(self, image_id: str) -> tuple[str, dict[str, Any]]:
        number, offset, size_bytes = self._lines[image_id]
        where = f"{self._path}: line {number}"
        line = storage.read_range(str(self._path), offset, size_bytes)
        cells = line.rstrip(b"\r\n").split(b"\t")
        if len(cells) != len(self._columns):
            raise FeatureError(f"{where}: {len(cells)} columns, expected {len(self._columns)}")
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
                raise FeatureError(f"{where}: {name}: {error}") from error
        count = fields.pop("num_boxes")
        for name in ("boxes", "features"):
            if not count or fields[name].size % count:
                raise FeatureError(
                    f"{where}: {name}: {fields[name].size} values for {count} boxes; was the file "
                    "cut short?"
                )
            fields[name] = fields[name].reshape(count, -1)
        return where, fields


class _NpzFolder(PublishedFeatures):
    layout = "npz"

    def __init__(self, path: Path) -> None:
        self._paths = {file.stem: file for file in sorted(path.glob("*.npz"))}
        if not self._paths:
            raise FeatureError(f"{path}: no .npz files in this folder")
        hasher = xxhash.xxh3_128()
        for name, file in self._paths.items():
            hasher.update(f"{name}\n".encode())
            hasher.update(file.read_bytes())
        self.digest = hasher.hexdigest()

    def ids(self) -> Sequence[str]:
        return list(self._paths)

    def fields(self, image_id: str) -> tuple[str, dict[str, Any]]:
        path = self._paths[image_id]
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files if name in _NAMES}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise FeatureError(f"{path}: cannot be read: {error}") from error
        return str(path), _renamed(arrays)


class _Hdf5(PublishedFeatures):
    layout = "VOLTA"

    def __init__(self, path: Path) -> None:
        try:
            import h5py
        except ImportError as error:
            raise FeatureError(f"{path}: HDF5 files need h5py: pip install h5py") from error
        self._path = path
        with path.open("rb") as file:
            hasher = xxhash.xxh3_128()
            while chunk := file.read(1 << 24):
                hasher.update(chunk)
        self.digest = hasher.hexdigest()
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            raise FeatureError(f"{path}: cannot be read: {error}") from error

    def ids(self) -> Sequence[str]:
        return list(self._file)

    def fields(self, image_id: str) -> tuple[str, dict[str, Any]]:
        group = self._file[image_id]
        return str(self._path), _renamed(
            {name: group[name][()] for name in group if name in _NAMES}
        )


def _renamed(arrays: Mapping[str, Any]) -> dict[str, Any]:
    fields = {_NAMES[name]: np.asarray(array) for name, array in arrays.items()}
    if "x" in arrays and "boxes" in fields and len(fields["features"]) != len(fields["boxes"]):
        fields["features"] = fields["features"].T  # OpenVQA: (2048, R)
    return fields


def _feature(fields: Mapping[str, Any], stored: Storage) -> Feature:
    import torch

    values = np.asarray(fields["features"], np.float32)
    if values.ndim != 2:
        raise FeatureError(f"features: expected (regions, values), found shape {values.shape}")
    if "fractions" in fields:
        boxes = fields["fractions"][:, :4]
    else:
        width, height = float(fields["width"]), float(fields["height"])
        boxes = fields["boxes"][:, :4] / np.array([width, height, width, height])
    boxes = np.clip(boxes, 0, 1).astype(np.float32)
    if boxes.shape != (len(values), 4) or not np.isfinite(boxes).all():
        raise FeatureError(f"boxes of shape {boxes.shape} for {len(values)} regions, or not finite")
    parts = {}
    for name, (part, dtype) in _PARTS.items():
        if name in fields:
            array = np.asarray(fields[name]).astype(dtype)
            if name != "classes":
                array = array.reshape(-1)
            if len(array) != len(values):
                raise FeatureError(f"{name}: {len(array)} of them for {len(values)} regions")
            parts[part] = array
    (packed,) = pack(torch.tensor(values).unsqueeze(0), stored)
    return Feature(packed.values, boxes, parts, quantized=packed.quantized)
