import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.sources.readers import tables
from pipeline.data.sources.readers.tables import Row, read_cell, rows, table_files
from pipeline.errors import SourceError

IMAGES = [b"one", None, b"three", b"four", b"five"]


def write_parquet(path: Path, nested: bool = True, images: list[bytes | None] = IMAGES) -> str:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": image, "path": f"{n}.png"} for n, image in enumerate(images)]
    image = pa.array(cells, kind) if nested else pa.array(images, pa.binary())
    words = [f"words {n}" for n in range(len(images))]
    table = pa.table({"image": image, "text": words, "other": words})
    pq.write_table(table, path, row_group_size=2)
    return str(path)


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.tsv", "t.csv.gz", "t.jsonl.gz"])
def test_every_text_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    text = {
        "jsonl": '{"a": "x, y", "b": "ü"}\n\n{"a": "z", "b": ""}\n',
        "json": '[{"a": "x, y", "b": "ü"}, {"a": "z", "b": ""}]',
        "csv": 'a,b\n"x, y",ü\nz,\n',
        "tsv": "a\tb\nx, y\tü\nz\t\n",
    }[name.split(".")[1]]
    payload = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(payload) if name.endswith(".gz") else payload)
    found = [row.values for row in rows(str(tmp_path / name), ["a", "b"], "a")]
    assert found == [{"a": "x, y", "b": "ü"}, {"a": "z", "b": ""}]


def test_a_bad_row_is_yielded_with_its_fault(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n{"a": \n[2]\n')
    found = list(rows(str(tmp_path / "t.jsonl"), ["a"], "a"))
    assert [row.place for row in found] == ["line 1", "line 2", "line 3"]
    assert "not valid JSON" in found[1].fault
    assert "expected an object, found [2]" in found[2].fault
    (tmp_path / "t.csv").write_text("a,b\n1,2\n1\n1,2,3\n")
    found = list(rows(str(tmp_path / "t.csv"), ["a"], "a"))
    assert [row.place for row in found] == ["line 2", "line 3", "line 4"]
    faults = [row.fault for row in found]
    assert faults == ["", "expected 2 cells, found 1", "expected 2 cells, found 3"]


@pytest.mark.parametrize("nested", [True, False])
def test_parquet_rows_leave_the_bytes_where_they_are(tmp_path: Path, nested: bool) -> None:
    location = write_parquet(tmp_path / "t.parquet", nested)
    found = list(rows(location, ["image", "text"], "image"))
    assert [row.values["text"] for row in found if row.values] == [f"words {n}" for n in range(5)]
    for row, image in zip(found, IMAGES, strict=True):
        assert row.values is not None
        assert set(row.values) == ({"image", "text"} if nested else {"text"})
        number = int(row.place.removeprefix("row ")) - 1
        assert row.values.get("image") == ({"path": f"{number}.png"} if nested else None)
        if image is None:
            with pytest.raises(SourceError, match="no image bytes in this row"):
                read_cell(row.image_bytes)
        else:
            assert read_cell(row.image_bytes) == image


def test_a_rewritten_table_is_not_read_from_memory(tmp_path: Path) -> None:
    location = write_parquet(tmp_path / "t.parquet")
    where = next(rows(location, ["image"], "image")).image_bytes
    assert read_cell(where) == b"one"
    write_parquet(tmp_path / "t.parquet", images=[b"another"])
    assert read_cell(where) == b"another"


def test_a_parquet_file_of_paths_alone_has_no_bytes(tmp_path: Path) -> None:
    location = write_parquet(tmp_path / "t.parquet", images=[None, None, None])
    assert [row.image_bytes for row in rows(location, ["image"], "image")] == ["", "", ""]


def test_row_groups_too_large_to_unpack_for_one_image_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = write_parquet(tmp_path / "t.parquet", images=[b"x" * 500, b"y" * 500])
    monkeypatch.setattr(tables, "MAX_IMAGE_GROUP_BYTES", 900)
    with pytest.raises(SourceError, match="row_group_size=100"):
        list(rows(location, ["image"], "image"))


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("t.csv", "a,b\n1,2\n", "no column 'c'; there are 'a', 'b'"),
        ("t.csv", "", "no column 'c'"),
        ("t.csv", "\xe9,c\n", r"t\.csv: line 1: byte 0xe9 is not UTF-8; .* `encoding` names it"),
        ("t.parquet", "nothing of the kind", "not whole, or not Parquet"),
        ("t.json", '{"rows": []}', "expected a list, found dict"),
    ],
)
def test_files_that_are_not_such_tables_are_named(
    tmp_path: Path, name: str, text: str, match: str
) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(SourceError, match=match):
        list(rows(str(tmp_path / name), ["c"], "c"))


def test_a_folder_of_tables_is_read_by_name(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "notes.txt"):
        (tmp_path / name).write_text(f'{{"a": "{name}"}}')
    files = table_files(str(tmp_path))
    found = [row for file in files for row in rows(file, ["a"], "a")]
    assert found == [Row("line 1", {"a": "a.jsonl"}), Row("line 1", {"a": "b.jsonl"})]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"expected a table or a folder of tables.*\.parquet"):
        table_files(str(tmp_path / "empty"))
