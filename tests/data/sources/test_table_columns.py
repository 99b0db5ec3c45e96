"""Listing by columns is listing row by row: the same of every row, however odd."""

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline.data.sources.base import Source
from pipeline.data.sources.columns import ColumnarSource, in_batches
from pipeline.data.sources.table import TableSource
from tests.data.sources.built import build, draw

CHARACTERS = "ab\\\"[](){}\n\t\x1c\x7f\x00 é中\U0001f600\x85\u3000.-_/,'"


def rows_of(batches: Any) -> dict[str, list[dict[str, Any]]]:
    """What was listed by key; of one key in the order of the listing."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for batch in batches:
        for row in batch.to_pylist():
            if row["reason"] is not None:  # columns keep what remains of a reject, records do not
                row = {name: row[name] for name in _OF_A_REJECT}
            found[row["key"]].append(row)
    return found


_OF_A_REJECT = (
    "key", "split", "reason", "detail", "image_fingerprint", "texts_fingerprint", "num_entries",
)  # fmt: skip


def same_both_ways(source: Source) -> tuple[int, int]:
    """Compares the two listings; returns the records, and how many rows were left row by row."""
    assert isinstance(source, TableSource)
    assert isinstance(source, ColumnarSource)
    one_by_one = rows_of(in_batches(source.records()))
    in_index = dict(source.index())
    batches = list(source.batches())
    assert rows_of(batches) == one_by_one
    assert source.index() == in_index
    assert sum(pc.sum(batch["num_entries"]).as_py() for batch in batches) == sum(in_index.values())
    return sum(map(len, one_by_one.values())), gathered_rows(source)


def gathered_rows(source: TableSource) -> int:
    """How many rows a columnar listing has left to the one row by row."""
    count = 0
    gather = source._gather

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return gather(*arguments)

    source._gather = counted  # type: ignore[method-assign, assignment]
    for _ in source.batches():
        pass
    return count


def text(rng: random.Random) -> str | None:
    if rng.random() < 0.1:
        return None
    if rng.random() < 0.3:
        return "".join(rng.choice(CHARACTERS) for _ in range(rng.randrange(7)))
    return f"a picture of {rng.randrange(1000)}"


def path(rng: random.Random) -> str | None:
    number = rng.randrange(40)
    usual = [f"{number}.png", f"sub/{number}.png", f"é{number}.png"]
    odd = [
        None, "", "/", f"./{number}.png", f"sub/../{number}.png", "../up.png", f"{number}", "a.xyz",
        f"lost/{number}.jpg", f"{number}.PNG", "https://example.org/b.png", "data:xyz",
        "x\0.png", f"sub//{number}.png", "png", ".png", f"{number}.m\u212av",
        "a\tb.png", 'q"u.png', "b\\c.png",
    ]  # fmt: skip
    return rng.choice(usual if rng.random() < 0.7 else odd)


KEYS: dict[str, tuple[pa.DataType, Any]] = {
    "int64": (pa.int64(), lambda rng: rng.choice([None, -3, rng.randrange(2**63), *range(60)])),
    "uint64": (pa.uint64(), lambda rng: rng.choice([2**63, 2**64 - 1, *range(60)])),
    "string": (
        pa.string(),
        lambda rng: rng.choice([text(rng), "007", "0", str(rng.randrange(80)), "9" * 19, "é" * 90]),
    ),
    "large_string": (pa.large_string(), lambda rng: f"k{rng.randrange(300)}"),
    "dictionary": (pa.dictionary(pa.int32(), pa.string()), lambda rng: f"k/{rng.randrange(300)}"),
    "float": (pa.float64(), lambda rng: rng.choice([None, 1.5, 2.0])),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    names = [f"{at}{number}.png" for at in ("", "sub/", "é") for number in range(0, 40, 2)]
    draw(*(folder / name for name in [*names, 'q"u.png', "b\\c.png"]))
    (folder / "a.xyz").touch()
    (folder / "png").touch()
    return folder


@pytest.mark.parametrize("key", [None, *KEYS])
@pytest.mark.parametrize("split", [False, True])
def test_paths_are_listed_alike(tmp_path: Path, images: Path, key: str | None, split: bool) -> None:
    rng = random.Random(f"{key}{split}")
    columns = {
        "file": pa.array([path(rng) for _ in range(400)]),
        "one": pa.array([text(rng) for _ in range(400)]),
        "some": pa.array(
            [rng.choice([None, [text(rng) for _ in range(rng.randrange(4))]]) for _ in range(400)],
            pa.list_(pa.string()),
        ),
        "part": pa.array([rng.choice(["train", "test", "", None, "a/b"]) for _ in range(400)]),
    }
    if key:
        kind, make = KEYS[key]
        columns["id"] = pa.array([make(rng) for _ in range(400)], kind)
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=150)
    source = build(
        "table",
        table=str(tmp_path / "t.parquet"),
        images=str(images),
        image="file",
        texts={"captions": ["one", "some"]},
        key="id" if key else None,
        split="part" if split else None,
    )
    num_rows, _ = same_both_ways(source)
    assert num_rows > 30


@pytest.mark.parametrize("key", [None, "id"])
@pytest.mark.parametrize("shape", ["cell", "struct", "path alone"])
def test_embedded_images_are_listed_alike(tmp_path: Path, key: str | None, shape: str) -> None:
    rng = random.Random(f"{key}{shape}")
    table = tmp_path / "data"
    table.mkdir()
    for part in range(2):
        payloads = [rng.choice([b"one", b"two", b"", None]) for _ in range(100)]
        paths = [rng.choice([f"{rng.randrange(80)}.png", "a b/é.JPG", "c.xyz"]) for _ in range(100)]
        if rng.random() < 0.5 and key:
            paths[7] = None  # type: ignore[call-overload]
        image: pa.Array = pa.array(payloads, pa.binary())
        if shape != "cell":
            cells = image if shape == "struct" else pa.nulls(100, pa.binary())
            image = pa.StructArray.from_arrays([cells, pa.array(paths)], ["bytes", "path"])
        columns = {
            "image": image,
            "said": pa.StructArray.from_arrays([pa.array([text(rng) for _ in range(100)])], ["x"]),
            "id": pa.array([rng.randrange(150) for _ in range(100)]),
        }
        pq.write_table(pa.table(columns), table / f"{part}.parquet", row_group_size=30)
    source = build(
        "table",
        table={"train": str(table)},
        image="image",
        texts={"captions": "said.x"},
        key=key,
        image_suffix="png",
    )
    same_both_ways(source)


def test_a_table_of_usual_rows_leaves_none_to_be_listed_one_by_one(tmp_path: Path) -> None:
    draw(tmp_path / "a" / "0.png")
    rows = {
        "file": [f"a/{number}.png" for number in range(2000)],
        "text": [f' "{number}" \\ in two words ' for number in range(2000)],
    }
    pq.write_table(pa.table(rows), tmp_path / "t.parquet", row_group_size=700)
    source = build(
        "table", table=str(tmp_path / "t.parquet"), image="file", texts={"captions": "text"}
    )
    assert same_both_ways(source) == (2000, 0)


def test_other_texts_and_other_files_are_listed_row_by_row(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    rows = pa.table({"file": ["a.png"] * 2, "q": ["what?"] * 2, "a": ["x", "y"]})
    pq.write_table(rows, tmp_path / "t.parquet")
    source = build(
        "table",
        table=str(tmp_path / "t.parquet"),
        image="file",
        texts={"question": "q", "answers": "a"},
    )
    assert same_both_ways(source) == (1, 2)
