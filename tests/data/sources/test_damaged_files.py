"""Whatever is wrong in one place of an annotation file or table: an error, or that record's reject.

Each seed damages one place of a small valid file: a value replaced or taken away, or bytes of the
file changed or cut off. A failure names the format and the seed.
"""

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.sample import check_key
from pipeline.data.sources.base import Record, Reject, Source, accounted
from pipeline.errors import PipelineError
from tests.data.sources.built import build, draw, fingerprints

NUM_IMAGES = 6
NUM_SEEDS = 150

# What takes a value's place; the last are JSON that Python does not write.
VALUES: list[Any] = [
    None, True, 0, -1, 1.5, 10**30, "", " ", "x", "x" * 300, "x" * 300 + "/y.jpg", "../../x.jpg",
    "/etc/passwd", "s3://b/x.jpg", "a\0b", "\ud800", "٣", [], {}, [[]], [None], {"": None},
    ["a", 1], {"question": "what?"}, "['a', 'b'", "[" * 3000, "train", "a/b", "0", "9" * 400,
]  # fmt: skip
RAW = ["9" * 5000, "1e999", "-Infinity", "NaN", "[" * 300 + "]" * 300, "[" * 3000 + "]" * 3000, ""]


def coco() -> Any:
    return {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(NUM_IMAGES)],
        "annotations": [
            {"id": n, "image_id": n % NUM_IMAGES, "caption": f"words {n}"}
            for n in range(2 * NUM_IMAGES)
        ],
    }


def karpathy() -> Any:
    images = [
        {"filename": f"{n}.jpg", "split": "val", "sentences": [{"raw": "a"}, {"raw": "b"}]}
        for n in range(NUM_IMAGES)
    ]
    return {"images": images, "dataset": "x"}


def questions() -> Any:
    asked = [{"question_id": n, "image_id": n, "question": "what?"} for n in range(NUM_IMAGES)]
    return {"questions": asked}


def annotations() -> Any:
    answers = [
        {
            "question_id": n,
            "image_id": n,
            "question_type": "what",
            "answer_type": "other",
            "answers": [{"answer": "x"}, {"answer": "y"}],
        }
        for n in range(NUM_IMAGES)
    ]
    return {"annotations": answers}


def visdial() -> Any:
    turn = {"question": 0, "answer": 1, "answer_options": [0, 1], "gt_index": 1}
    dialogs = [
        {"image_id": n, "caption": "words", "dialog": [dict(turn), dict(turn)]}
        for n in range(NUM_IMAGES)
    ]
    return {
        "data": {"questions": ["is it", "was it"], "answers": ["no", "yes"], "dialogs": dialogs}
    }


def dense() -> Any:
    return [{"image_id": n, "round_id": 1, "relevance": [0.5, 1]} for n in range(NUM_IMAGES)]


def table() -> Any:
    return [
        {
            "image": f"{n}.jpg",
            "id": n,
            "split": "train",
            "caption": ["a", "b"],
            "question": "what?",
            "answers": ["x"],
            "dialog": {"caption": "c", "rounds": [{"question": "q", "answer": "a"}]},
        }
        for n in range(NUM_IMAGES)
    ]


COLUMNS = {
    "captions": "caption",
    "question": "question",
    "answers": "answers",
    "dialogs": "dialog",
}


def damaged(document: Any, chance: random.Random) -> str:
    """Returns a document's JSON with one of its values replaced or taken away."""
    places: list[tuple[Any, Any]] = []

    def look(value: Any) -> None:
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for name, part in parts:
            places.append((value, name))
            if isinstance(part, dict | list):
                look(part)

    look(document)
    holder, name = chance.choice(places)
    if chance.random() < 0.2:
        del holder[name]
        return json.dumps(document)
    if chance.random() < 0.2 and isinstance(holder, dict):
        holder[chance.choice(["", "x", "id", "\ud800"])] = holder.pop(name)
        return json.dumps(document)
    if chance.random() < 0.3:
        holder[name] = "@raw@"
        return json.dumps(document).replace('"@raw@"', chance.choice(RAW))
    holder[name] = chance.choice(VALUES)
    return json.dumps(document)


def broken(payload: bytes, chance: random.Random) -> bytes:
    """Returns bytes with some of them changed, taken away or put in."""
    place = chance.randrange(len(payload))
    bits = bytes([payload[place] ^ (1 << chance.randrange(8))])
    return chance.choice(
        [
            payload[:place],
            payload[:place] + bits + payload[place + 1 :],
            payload[:place] + chance.randbytes(3) + payload[place:],
            payload[:place] + chance.choice([b'"', b"\n", b"\r", b"\0", b"\xff"]) + payload[place:],
            payload[:place] + payload[place + chance.randrange(20) :],
        ]
    )


def listed_or_refused(source: Callable[[], Source]) -> tuple[int, int] | None:
    """Returns how many samples and rejects are listed, all of them storable; None if refused."""
    try:
        entries = list(accounted(source()))
    except PipelineError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert len(refusal.encode()) < 2000
        assert "read wrongly" not in refusal
        return None
    for entry in entries:
        check_key(entry.key)
        pa.array([entry.key, entry.split, entry.detail, *fingerprints(entry)], pa.string())
        found = entry.remains if isinstance(entry, Reject) else entry
        if found is not None:
            pa.array([found.image, found.suffix], pa.string())
            assert found.texts.decode().encoded() == found.texts
    num_live = sum(isinstance(entry, Record) for entry in entries)
    return num_live, len(entries) - num_live


def check(
    write: Callable[[random.Random], None], source: Callable[[], Source], least_live: int
) -> None:
    """Damages and lists with every seed; where a file is not refused, the rest of it is there."""
    num_refused = 0
    for seed in range(NUM_SEEDS):
        write(random.Random(seed))
        try:
            found = listed_or_refused(source)
            num_refused += found is None
            if found is not None:
                num_live, num_rejects = found
                assert num_live >= least_live or num_rejects >= NUM_IMAGES  # a list emptied
                assert num_live + num_rejects >= NUM_IMAGES - 1
        except BaseException:
            print(f"seed {seed}")
            raise
    assert num_refused < NUM_SEEDS // 2


@pytest.fixture
def images(tmp_path: Path) -> str:
    draw(*(tmp_path / "images" / f"{n}.jpg" for n in range(NUM_IMAGES)))
    return str(tmp_path / "images")


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("coco-captions", {"annotations": coco}),
        ("karpathy", {"annotations": karpathy}),
        ("vqa", {"questions": questions, "annotations": annotations}),
        ("visdial", {"dialogs": visdial, "dense": dense}),
    ],
)
def test_one_damaged_value_costs_one_record(
    tmp_path: Path, images: str, kind: str, files: dict[str, Callable[[], Any]]
) -> None:
    def write(chance: random.Random) -> None:
        hit = chance.choice(list(files))
        for name, document in files.items():
            text = damaged(document(), chance) if name == hit else json.dumps(document())
            (tmp_path / f"{name}.json").write_text(text)

    paths = {name: str(tmp_path / f"{name}.json") for name in files}
    # An image is two records: a damaged number may also take another's place.
    check(write, lambda: build(kind, images=images, **paths), NUM_IMAGES - 2)


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.parquet"])
@pytest.mark.parametrize("key", ["id", None])
def test_one_damaged_value_costs_one_row(
    tmp_path: Path, images: str, name: str, key: str | None
) -> None:
    def write(chance: random.Random) -> None:
        rows = table()
        row = chance.randrange(NUM_IMAGES)
        text = damaged(rows[row], chance)
        if name == "t.jsonl":
            lines = [text if n == row else json.dumps(rows[n]) for n in range(NUM_IMAGES)]
            (tmp_path / name).write_text("\n".join(lines))
        elif name == "t.json":
            parts = [text if n == row else json.dumps(rows[n]) for n in range(NUM_IMAGES)]
            (tmp_path / name).write_text(f"[{','.join(parts)}]")
        elif name == "t.csv":
            with (tmp_path / name).open("w", newline="", errors="surrogatepass") as file:
                writer = csv.DictWriter(file, list(table()[0]), extrasaction="ignore")
                writer.writeheader()
                for values in rows:
                    cells = {column: as_cell(value) for column, value in values.items()}
                    writer.writerow(cells)
        else:
            columns = {
                column: [as_cell(values.get(column)) for values in rows] for column in table()[0]
            }
            pq.write_table(pa.table(columns), tmp_path / name, row_group_size=4)

    def as_cell(value: Any) -> str | None:
        text = value if isinstance(value, str) else json.dumps(value) if value else None
        return text.encode("utf-8", "replace").decode() if text and name == "t.parquet" else text

    def source() -> Source:
        return build(
            "table",
            table=str(tmp_path / name),
            images=images,
            image="image",
            texts=COLUMNS,
            key=key,
            split="split",
        )

    check(write, source, NUM_IMAGES - 2)


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.tsv", "t.txt", "t.jsonl.gz", "t.parquet"])
def test_damaged_bytes_of_a_table_end_in_rejects_or_one_sentence(
    tmp_path: Path, images: str, name: str
) -> None:
    texts = {"t.csv": ",", "t.tsv": "\t", "t.txt": "|"}
    if name in texts:
        lines = [texts[name].join(("image", "caption", "note"))]
        lines += [
            texts[name].join((f"{n}.jpg", f'"words, {n}"' if n % 2 else "words", "x"))
            for n in range(NUM_IMAGES)
        ]
        payload = "\n".join(lines).encode()
    elif name == "t.parquet":
        stored = io.BytesIO()
        cells = [{"bytes": b"x%d" % n, "path": f"{n // 2}.jpg"} for n in range(NUM_IMAGES)]
        words = [f"words {n}" for n in range(NUM_IMAGES)]
        pq.write_table(pa.table({"image": cells, "caption": words}), stored, row_group_size=2)
        payload = stored.getvalue()
    else:
        payload = b"".join(json.dumps(row).encode() + b"\n" for row in table())
        payload = gzip.compress(payload) if name.endswith(".gz") else payload

    settings = {"delimiter": "|"} if name == "t.txt" else {}
    for seed in range(NUM_SEEDS):
        (tmp_path / name).write_bytes(broken(payload, random.Random(seed)))
        try:
            listed_or_refused(
                lambda: build(
                    "table",
                    table=str(tmp_path / name),
                    images=images,
                    image="image",
                    texts={"captions": "caption"},
                    **settings,
                )
            )
        except BaseException:
            print(f"seed {seed}")
            raise


def test_damaged_lines_of_a_token_file_cost_themselves(tmp_path: Path, images: str) -> None:
    lines = [f"{n}.jpg#{k}\twords" for n in range(NUM_IMAGES) for k in range(2)]
    payload = "\n".join(lines).encode()

    def write(chance: random.Random) -> None:
        (tmp_path / "t.token").write_bytes(broken(payload, chance))

    for seed in range(NUM_SEEDS):
        write(random.Random(seed))
        try:
            listed_or_refused(
                lambda: build("flickr", images=images, captions=str(tmp_path / "t.token"))
            )
        except BaseException:
            print(f"seed {seed}")
            raise
