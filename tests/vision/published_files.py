"""Files of region features as their publishers laid them out."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WIDTH, HEIGHT = 200, 100


@dataclass(frozen=True)
class Made:
    """What a published image has: R regions of 6 values, boxes in pixels of 200 × 100."""

    values: np.ndarray  # (R, 6) float32
    boxes: np.ndarray  # (R, 4) float32 pixels
    objects: np.ndarray  # (R,) int64
    scores: np.ndarray  # (R,) float32
    classes: np.ndarray  # (R, 3) float32

    def fractions(self) -> np.ndarray:
        return self.boxes / np.array([WIDTH, HEIGHT, WIDTH, HEIGHT], np.float32)


def make(number: int) -> Made:
    rng = np.random.default_rng(number)
    count = 2 + number % 3
    corners = rng.random((count, 2)) * [100, 50]
    boxes = np.concatenate([corners, corners + np.array([90, 40])], axis=1).astype(np.float32)
    return Made(
        values=np.abs(rng.standard_normal((count, 6))).astype(np.float32),
        boxes=boxes,
        objects=rng.integers(0, 1600, count),
        scores=rng.random(count).astype(np.float32),
        classes=rng.dirichlet(np.ones(3), count).astype(np.float32),
    )


def encoded(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def bottom_up_line(image_id: str, made: Made) -> str:
    cells = [image_id, WIDTH, HEIGHT, len(made.values), encoded(made.boxes), encoded(made.values)]
    return "\t".join(map(str, cells)) + "\n"


def lxmert_line(image_id: str, made: Made) -> str:
    detected = [encoded(made.objects), encoded(made.scores)]
    cells = [image_id, HEIGHT, WIDTH, *detected, *detected, len(made.values)]
    return "\t".join(map(str, [*cells, encoded(made.boxes), encoded(made.values)])) + "\n"


def write_table(path: Path, images: Mapping[str, Made], layout: str) -> str:
    line = {"bottom-up attention": bottom_up_line, "LXMERT": lxmert_line}[layout]
    path.write_text("".join(line(image_id, made) for image_id, made in images.items()))
    return str(path)


def write_uniter(folder: Path, images: Mapping[str, Made]) -> str:
    folder.mkdir()
    for image_id, made in images.items():
        size = made.fractions()[:, 2:] - made.fractions()[:, :2]
        np.savez(
            folder / f"{image_id}.npz",
            features=made.values.astype(np.float16),
            norm_bb=np.concatenate([made.fractions(), size], axis=1).astype(np.float16),
            conf=made.scores,
            soft_labels=made.classes.astype(np.float16),
        )
    return str(folder)


def write_openvqa(folder: Path, images: Mapping[str, Made]) -> str:
    folder.mkdir()
    for image_id, made in images.items():
        np.savez(
            folder / f"{image_id}.npz",
            x=made.values.T,
            bbox=made.boxes,
            image_w=WIDTH,
            image_h=HEIGHT,
            num_bbox=len(made.boxes),
        )
    return str(folder)


def write_volta(path: Path, images: Mapping[str, Made]) -> str:
    import h5py

    with h5py.File(path, "w") as file:
        for image_id, made in images.items():
            group = file.create_group(image_id)
            group["features"], group["boxes"] = made.values, made.boxes
            group["obj_id"], group["obj_conf"] = made.objects, made.scores
            group["attr_id"], group["attr_conf"] = made.objects, made.scores
            group["img_w"], group["img_h"] = WIDTH, HEIGHT
    return str(path)
