"""Small inputs of every source, and random damage to them."""

import csv
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

NUM_IMAGES = 10
NUMBERS = range(1, NUM_IMAGES + 1)

Settings = dict[str, Any]


def build_folder(folder: Path) -> Settings:
    _draw(folder / "photos")
    for n in NUMBERS:
        described = folder / "photos" / f"{n}"
        if n % 3:
            described.with_suffix(".txt").write_text(f"picture {n}\n")
        else:
            described.with_suffix(".json").write_text(json.dumps({"captions": [f"picture {n}"]}))
    return {"type": "folder", "folder": str(folder / "photos")}


def build_jsonl(folder: Path) -> Settings:
    _draw(folder / "photos")
    (folder / "table.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in _rows()))
    return _table(folder, "table.jsonl")


def build_csv(folder: Path) -> Settings:
    _draw(folder / "photos")
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        writer.writerows([row["image"], row["caption"]] for row in _rows())
    return _table(folder, "table.csv")


def build_parquet(folder: Path) -> Settings:
    _draw(folder / "photos")
    pq.write_table(pa.Table.from_pylist(_rows()), folder / "table.parquet", row_group_size=4)
    return _table(folder, "table.parquet")


def build_embedded(folder: Path) -> Settings:
    rows = [
        {"image": {"bytes": _image(n), "path": f"{n}.png"}, "caption": f"picture {n}"}
        for n in NUMBERS
    ]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "table.parquet", row_group_size=4)
    texts = {"captions": "caption"}
    return {
        "type": "table", "table": str(folder / "table.parquet"), "image": "image", "texts": texts,
    }  # fmt: skip


def build_coco(folder: Path) -> Settings:
    _draw(folder / "photos")
    document = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in NUMBERS],
        "annotations": [
            {"id": 10 * n + i, "image_id": n, "caption": f"picture {n}, {i}"}
            for n in NUMBERS
            for i in range(2)
        ],
    }
    (folder / "captions.json").write_text(json.dumps(document))
    return {
        "type": "coco-captions", "images": str(folder / "photos"),
        "annotations": str(folder / "captions.json"),
    }  # fmt: skip


def build_karpathy(folder: Path) -> Settings:
    _draw(folder / "photos")
    images = [
        {"filename": f"{n}.png", "split": "train", "sentences": [{"raw": f"picture {n}"}]}
        for n in NUMBERS
    ]
    (folder / "dataset.json").write_text(json.dumps({"images": images, "dataset": "chaos"}))
    return {
        "type": "karpathy", "images": str(folder / "photos"),
        "annotations": str(folder / "dataset.json"),
    }  # fmt: skip


def build_flickr(folder: Path) -> Settings:
    _draw(folder / "photos")
    lines = (f"{n}.png#{i}\tpicture {n}, {i}\n" for n in NUMBERS for i in range(2))
    (folder / "results.token").write_text("".join(lines))
    return {
        "type": "flickr", "images": str(folder / "photos"),
        "captions": str(folder / "results.token"),
    }  # fmt: skip


def build_vqa(folder: Path) -> Settings:
    _draw(folder / "photos")
    questions = [{"question_id": n, "image_id": n, "question": "which?"} for n in NUMBERS]
    annotations = [
        {
            "question_id": n, "image_id": n, "question_type": "which", "answer_type": "number",
            "multiple_choice_answer": str(n), "answers": [{"answer": str(n), "answer_id": 1}],
        }
        for n in NUMBERS
    ]  # fmt: skip
    (folder / "questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    return {
        "type": "vqa", "images": str(folder / "photos"),
        "questions": str(folder / "questions.json"),
        "annotations": str(folder / "annotations.json"),
    }  # fmt: skip


def build_visdial(folder: Path) -> Settings:
    _draw(folder / "photos")
    dialogs = [
        {"image_id": n, "caption": f"picture {n}", "dialog": [{"question": 0, "answer": n - 1}]}
        for n in NUMBERS
    ]
    data = {"questions": ["which"], "answers": [*map(str, NUMBERS)], "dialogs": dialogs}
    (folder / "visdial.json").write_text(json.dumps({"version": "1.0", "data": data}))
    return {
        "type": "visdial", "images": str(folder / "photos"),
        "dialogs": str(folder / "visdial.json"),
    }  # fmt: skip


def build_tars(folder: Path) -> Settings:
    (folder / "tars").mkdir(parents=True)
    for name, numbers in (("a", NUMBERS[:6]), ("b", NUMBERS[6:])):
        with tarfile.open(folder / "tars" / f"{name}.tar", "w") as tar:
            for n in numbers:
                for suffix, payload in (("png", _image(n)), ("txt", f"picture {n}".encode())):
                    member = tarfile.TarInfo(f"{n}.{suffix}")
                    member.size = len(payload)
                    tar.addfile(member, io.BytesIO(payload))
    return {"type": "webdataset", "shards": str(folder / "tars")}


def build_copied_tars(folder: Path) -> Settings:
    return build_tars(folder) | {"in_place": False}


def build_merged(folder: Path) -> Settings:
    sources = [build_coco(folder), build_vqa(folder)]
    return {"type": "merged", "sources": sources}


BUILDERS: dict[str, Callable[[Path], Settings]] = {
    "folder": build_folder,
    "jsonl": build_jsonl,
    "csv": build_csv,
    "parquet": build_parquet,
    "embedded": build_embedded,
    "coco": build_coco,
    "karpathy": build_karpathy,
    "flickr": build_flickr,
    "vqa": build_vqa,
    "visdial": build_visdial,
    "tars": build_tars,
    "copied-tars": build_copied_tars,
    "merged": build_merged,
}


def damage(folder: Path, random: Random) -> tuple[str, set[str]]:
    """Damages one file below a folder; returns in words how, and the names of files touched."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    path = random.choice(files)
    if random.random() < 0.4:  # rather the annotations than one of many images
        path = random.choice([file for file in files if file.suffix != ".png"] or files)
    kind = random.choice(_KINDS)
    touched = {path.name}
    payload = bytearray(path.read_bytes())
    match kind:
        case "flip":
            for _ in range(random.randint(1, 3)):
                if payload:
                    payload[random.randrange(len(payload))] ^= 1 << random.randrange(8)
            path.write_bytes(payload)
        case "cut":
            path.write_bytes(payload[: random.randrange(len(payload) + 1)])
        case "block":
            start = random.randrange(len(payload) + 1)
            length = random.choice((1, 16, 512, 1024))
            filler = random.choice((bytes(length), random.randbytes(length), b""))
            path.write_bytes(bytes(payload[:start]) + filler + bytes(payload[start + length :]))
        case "insert":
            start = random.randrange(len(payload) + 1)
            odd = random.choice(_ODD_TEXTS)
            path.write_bytes(bytes(payload[:start]) + odd + bytes(payload[start:]))
        case "value":
            _replace_value(path, bytes(payload), random)
        case "twice":
            path.write_bytes(bytes(payload) * 2)
        case "delete":
            path.unlink()
        case "copy":
            name = random.choice(_ODD_NAMES)
            touched.add(name)
            shutil.copy(path, path.with_name(name + path.suffix))
        case "rename":
            path.rename(path.with_name(random.choice(_ODD_NAMES) + path.suffix))
        case "not-a-file":
            path.unlink()
            random.choice((_dangle, _circle, os.mkfifo, Path.mkdir))(path)
        case _:
            other = random.choice(files)
            touched.add(other.name)
            theirs = other.read_bytes()
            other.write_bytes(payload)
            path.write_bytes(theirs)
    return f"{kind} of {path.name}", touched


_KINDS = (
    "flip", "flip", "cut", "block", "insert", "value", "value", "twice", "delete", "copy",
    "rename", "not-a-file", "swap",
)  # fmt: skip
_ODD_NAMES = (
    "with space", "a%20b", "[x]", "é", "caf\udce9", "-", "a.b.c", "x" * 200, "a\nb", "#",
    "?", "{1..2}",
)  # fmt: skip
_ODD_TEXTS = (
    b'"', b"\n", b"\x00", b"\xff", b"\xef\xbb\xbf", b",", b"\t", b"{", b"[" * 3000, b"1e999", b"\r",
    b"9" * 5000, rb"\ud800",
)  # fmt: skip
_ODD_VALUES = (
    b"null", b"NaN", b"1e999", b"-1", b"true", b'""', b"[]", b"{}", b'"\\ud800"', b"[" * 2000,
    b"9" * 5000, b'"../../../etc/passwd"', b'"simplecache::http://127.0.0.1:9/x"', b'"\\u0000"',
)  # fmt: skip


def _replace_value(path: Path, payload: bytes, random: Random) -> None:
    """Puts an odd value in place of what lies between two separators."""
    separators = [
        0,
        *(i for i, byte in enumerate(payload) if byte in b':,[]{}"\t\n '),
        len(payload),
    ]
    start = random.randrange(len(separators))
    end = min(start + random.choice((1, 1, 2)), len(separators) - 1)
    odd = random.choice(_ODD_VALUES)
    path.write_bytes(payload[: separators[start] + 1] + odd + payload[separators[end] :])


def _dangle(path: Path) -> None:
    path.symlink_to("nowhere")


def _circle(path: Path) -> None:
    path.symlink_to(path.name)


def _rows() -> Sequence[dict[str, str]]:
    return [{"image": f"photos/{n}.png", "caption": f"picture {n}"} for n in NUMBERS]


def _table(folder: Path, name: str) -> Settings:
    texts = {"captions": "caption"}
    return {"type": "table", "table": str(folder / name), "image": "image", "texts": texts}


def _draw(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for n in NUMBERS:
        (folder / f"{n}.png").write_bytes(_image(n))


def _image(n: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 12), (10 * n, 40, 90)).save(file, "PNG")
    return file.getvalue()
