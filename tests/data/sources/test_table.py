import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from pipeline import storage
from pipeline.data.read.dataset import Dataset
from pipeline.data.sources import table as table_module
from pipeline.data.sources.readers.tables import TablePart
from pipeline.errors import ConfigError, SourceError
from tests.data.sources.built import (
    build,
    draw,
    fingerprints,
    ingested,
    listed,
    reason,
    reasons,
    record,
)
from tests.vision.video_files import dicom, video


def write_jsonl(path: Path, *rows: dict[str, Any] | str) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines))
    return str(path)


def test_rows_of_one_image_are_one_sample(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", tmp_path / "sub" / "b.jpg")
    table = write_jsonl(
        tmp_path / "t.jsonl",
        {"file": "a.png", "text": "one", "q": "what?", "a": "x"},
        {"file": "sub/b.jpg", "text": ["two", "three"]},
        {"file": "a.png", "text": "four", "q": "what?", "a": "y"},
    )
    columns = {"captions": "text", "question": "q", "answers": "a"}
    source = build("table", table=table, image="file", texts=columns)
    found = record(source, "a")
    assert found.texts.decode().captions == ("one", "four")
    assert [asked.answers for asked in found.texts.decode().questions] == [("x", "y")]
    assert (found.suffix, source.read(found)) == ("png", (tmp_path / "a.png").read_bytes())
    assert len(listed(source)) == 2


def test_daquars_csv_has_one_sample_for_each_of_105_images(shared_data: Path) -> None:
    folder = shared_data / "daquar"
    source = build(
        "table",
        table={"validation": str(folder / "daquar_val.csv")},
        images=str(folder / "images"),
        image="image_id",
        texts={"question": "question", "answers": "answer"},
    )
    entries = listed(source)
    assert Counter(map(reason, entries.values())) == {"live": 105}
    questions = [asked for e in entries.values() for asked in e.texts.decode().questions]  # type: ignore[union-attr]
    assert sum(len(asked.answers) for asked in questions) == 957
    assert len({asked.question_id for asked in questions}) == len(questions)
    assert record(source, "image1032").texts.decode().questions[1].answers == ("1",)


@pytest.mark.parametrize("with_path", [True, False])
def test_parquet_as_hugging_face_writes_it(tmp_path: Path, with_path: bool) -> None:
    draw(*(tmp_path / f"{n}.png" for n in range(5)))
    cells = [
        {"bytes": (tmp_path / f"{n}.png").read_bytes(), "path": f"{n}.png" if with_path else None}
        for n in range(5)
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = {"image": pa.array(cells, kind), "text": list("abcde"), "id": list(range(5))}
    (tmp_path / "data").mkdir()
    for part in range(2):
        rows_of_part = pa.table(rows).slice(part * 3, 3)
        path = tmp_path / "data" / f"train-0000{part}-of-00002.parquet"
        pq.write_table(rows_of_part, path, row_group_size=2)
    settings = {
        "table": {"train": str(tmp_path / "data")},
        "image": "image",
        "texts": {"captions": "text"},
        "image_suffix": "png",
    }
    if with_path:
        assert set(listed(build("table", **settings))) == set("01234")
    else:
        digests = {xxhash.xxh3_128_hexdigest(cell["bytes"]) for cell in cells}  # type: ignore[arg-type]
        assert set(listed(build("table", **settings))) == digests
    source = build("table", **settings, key="id")
    report = ingested(source, tmp_path)
    assert (report.num_live, report.rejects) == (5, {})
    split = Dataset.open(str(tmp_path / "dataset")).split("train")
    for row, key in enumerate(split.each_key()):
        assert split.image(row) == cells[int(key)]["bytes"]
        assert split.texts([row])[0].captions == ("abcde"[int(key)],)
    assert ingested(source, tmp_path).num_unchanged == 5


def test_each_fault_has_its_reason(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", tmp_path / "b.png", tmp_path / "silent.png")
    (tmp_path / "c.xyz").touch()
    table = write_jsonl(
        tmp_path / "t.jsonl",
        {"file": "a.png", "id": 1, "text": "one", "split": "train"},
        {"file": "b.png", "id": 1, "text": "another image", "split": "train"},
        {"file": "a.png", "id": 1, "text": "two", "split": "test"},
        {"file": "a.png", "id": None, "text": "one", "split": "train"},
        {"file": None, "id": 2, "text": "one", "split": "train"},
        {"file": "lost.png", "id": 3, "text": "one", "split": "train"},
        {"file": "c.xyz", "id": 4, "text": "one", "split": "train"},
        {"file": "silent.png", "id": 5, "text": "", "split": "train"},
        {"file": "b.png", "id": 6, "text": 6, "split": "train"},
        {"file": "b.png", "id": 7, "text": "one", "split": "a/b"},
        {"file": "https://example.org/b.png", "id": 8, "text": "one", "split": "train"},
        {"file": "b.png", "id": 9.5, "text": "one", "split": "train"},
        '{"file": ',
    )
    source = build(
        "table", table=table, image="file", key="id", split="split", texts={"captions": "text"}
    )
    report = ingested(source, tmp_path)
    assert report.num_live == 1
    assert report.num_listed == 12
    assert report.rejects == {
        "malformed-row": 4,
        "forbidden-location": 1,
        "duplicate-id": 1,
        "no-key": 1,
        "no-image": 1,
        "missing-image": 1,
        "unknown-suffix": 1,
        "no-texts": 1,
    }
    found = next(entry for entry in source.records() if reason(entry) == "live")
    assert (found.key, found.split) == ("000000000001", "train")
    assert found.detail == "also listed for test"
    assert found.texts.decode().captions == ("one", "two")  # type: ignore[union-attr]
    details = {entry.key: entry.detail for entry in source.records()}
    assert any("t.jsonl: line 13: not valid JSON" in detail for detail in details.values())


@pytest.mark.parametrize(("value", "key"), [("42", f"{42:012d}"), ("007", "007"), ("x7", "x7")])
def test_keys_of_digits_are_numbers_as_coco_writes_them(
    tmp_path: Path, value: str, key: str
) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text(f"id,file,text\n{value},a.png,words\n")
    source = build(
        "table",
        table=str(tmp_path / "t.csv"),
        image="file",
        key="id",
        texts={"captions": "text"},
    )
    assert list(listed(source)) == [key]


def test_a_column_that_no_row_has_is_named(tmp_path: Path) -> None:
    table = write_jsonl(tmp_path / "t.jsonl", {"file": "a.png", "text": "one"})
    source = build("table", table=table, image="file", texts={"captions": ["text", "txet"]})
    with pytest.raises(SourceError, match=r"no row has 'txet'; the last has 'file', 'text'"):
        listed(source)


def test_order_of_rows_does_not_change_keys_or_splits(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(40)]
    draw(*(tmp_path / name for name in names))
    rows = [{"file": name, "text": "x"} for name in names]
    splits = []
    for order in (rows, rows[::-1]):
        table = write_jsonl(tmp_path / "t.jsonl", *order)
        source = build("table", table=table, image="file", texts={"captions": "text"})
        splits.append(
            {entry.key: (entry.split, *fingerprints(entry)) for entry in source.records()}
        )
    assert splits[0] == splits[1]
    assert {split for split, *_ in splits[0].values()} == {"train", "validation"}


def test_a_table_may_be_on_an_object_store(tmp_path: Path, object_store: str) -> None:
    draw(tmp_path / "a.png")
    cells = [{"bytes": (tmp_path / "a.png").read_bytes(), "path": "a.png"}]
    pq.write_table(pa.table({"image": cells, "text": ["x"]}), tmp_path / "t.parquet")
    storage.write_bytes(f"{object_store}/t.parquet", (tmp_path / "t.parquet").read_bytes())
    storage.write_bytes(f"{object_store}/i/a.png", (tmp_path / "a.png").read_bytes())
    storage.write_bytes(f"{object_store}/t.csv", b"file,text\ni/a.png,x\n")
    for name, image in (("t.parquet", "image"), ("t.csv", "file")):
        source = build(
            "table", table=f"{object_store}/{name}", image=image, texts={"captions": "text"}
        )
        (found,) = source.records()
        assert reason(found) == "live"
        assert source.read(found) == cells[0]["bytes"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"texts": {}}, "name a column"),
        ({"texts": {"captoins": "x"}}, "captoins"),
        ({"table": {"train": "t"}, "split": "s"}, "split is a column of a single table"),
        ({"split": "s", "validation_fraction": 0.1}, "both say what a split is"),
        ({"image_suffix": "xyz"}, "image_suffix"),
    ],
)
def test_settings_that_disagree_are_refused(settings: dict[str, Any], match: str) -> None:
    given: dict[str, Any] = {"table": "t", "image": "file", "texts": {"captions": "text"}}
    with pytest.raises(ConfigError, match=match):
        build("table", **given | settings)


def test_a_row_may_name_a_video_or_a_dicom(tmp_path: Path) -> None:
    (tmp_path / "clip.webm").write_bytes(video(5, form="webm"))
    (tmp_path / "scan.dcm").write_bytes(dicom(np.zeros((4, 6))))
    rows = [{"file": name, "text": "words"} for name in ("clip.webm", "scan.dcm")]
    table = write_jsonl(tmp_path / "t.jsonl", *rows)
    source = build("table", table=table, image="file", texts={"captions": "text"})
    assert {key: record(source, key).suffix for key in listed(source)} == {
        "clip": "webm",
        "scan": "dcm",
    }
    assert ingested(source, tmp_path).num_live == 2


def write_embedded(path: Path, *rows: tuple[bytes, str | None, str], group: int = 2) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array([{"bytes": image, "path": name} for image, name, _ in rows], kind)
    path.parent.mkdir(exist_ok=True)
    table = pa.table({"image": cells, "text": [text for *_, text in rows]})
    pq.write_table(table, path, row_group_size=group)


@pytest.fixture
def pictures(tmp_path: Path) -> list[bytes]:
    paths = [tmp_path / f"{n}.png" for n in range(13)]
    draw(*paths)
    return [path.read_bytes() for path in paths]


def embedded(*files: Path, **settings: Any) -> Any:
    table = {f"part{n}": str(file) for n, file in enumerate(files)}
    return build("table", table=table, image="image", texts={"captions": "text"}, **settings)


def captions(source: Any) -> dict[str, tuple[str, ...]]:
    return {entry.key: entry.texts.decode().captions for entry in source.records()}


def test_embedded_images_of_one_name_are_samples_of_their_own(
    tmp_path: Path, pictures: list[bytes]
) -> None:
    red, blue, green, *_ = pictures
    write_embedded(
        tmp_path / "a.parquet",
        (red, "1.png", "red"),
        (blue, "1.png", "blue"),
        (green, "2.png", "green"),
        (red, "1.png", "red again"),
    )
    source = embedded(tmp_path / "a.parquet")
    own = {image: f"1-{xxhash.xxh3_128_hexdigest(image)[:16]}" for image in (red, blue)}
    expected = {own[red]: ("red", "red again"), own[blue]: ("blue",), "2": ("green",)}
    assert captions(source) == expected
    for image, key in own.items():
        assert source.read(record(source, key)) == image
        assert record(source, key).texts.decode().image_id == key
    assert (ingested(source, tmp_path).num_live, ingested(source, tmp_path).num_unchanged) == (3, 3)


def test_embedded_images_of_one_name_stay_apart_between_files_and_splits(
    tmp_path: Path, pictures: list[bytes]
) -> None:
    files = [tmp_path / f"{n}.parquet" for n in range(2)]
    write_embedded(files[0], (pictures[0], "1.png", "red"), (pictures[2], "2.png", "green"))
    write_embedded(files[1], (pictures[1], "1.png", "blue"), (pictures[2], "2.png", "grass"))
    found = captions(embedded(*files))
    assert sorted(found.values()) == [("blue",), ("green", "grass"), ("red",)]
    assert captions(embedded(*files[::-1])).keys() == found.keys()
    assert record(embedded(*files), "2").detail == "also listed for part1"


def test_a_night_that_adds_an_image_of_a_known_name_moves_one_sample_and_loses_none(
    tmp_path: Path, pictures: list[bytes]
) -> None:
    file = tmp_path / "a.parquet"
    rows = [(image, f"{n}.png", f"words {n}") for n, image in enumerate(pictures[:12])]
    write_embedded(file, *rows)
    source = build("table", table=str(file), image="image", texts={"captions": "text"})
    assert ingested(source, tmp_path).num_live == 12
    write_embedded(file, (pictures[12], "0.png", "another"), *rows)
    before = {key: entry.split for key, entry in listed(source).items()}
    report = ingested(source, tmp_path)
    assert (report.num_live, report.num_added, report.num_removed) == (13, 2, 1)
    assert report.rejects == {}
    assert len({split for key, split in before.items() if key.startswith("0-")}) == 1
    write_embedded(file, *rows[::-1])
    report = ingested(source, tmp_path)
    assert (report.num_live, report.num_added, report.num_removed) == (12, 1, 2)


def test_embedded_images_without_a_path_have_their_digest_for_a_key(
    tmp_path: Path, pictures: list[bytes]
) -> None:
    red, blue, *_ = pictures
    rows = [(red, None, "red"), (blue, None, "blue"), (red, None, "red again"), (b"", None, "-")]
    write_embedded(tmp_path / "a.parquet", *rows)
    found = listed(embedded(tmp_path / "a.parquet"))
    assert {reason(entry) for entry in found.values()} == {"live", "no-image"}
    assert record(
        embedded(tmp_path / "a.parquet"), xxhash.xxh3_128_hexdigest(red)
    ).texts.decode().captions == ("red", "red again")
    write_embedded(tmp_path / "b.parquet", *rows[::-1], group=3)
    live = {key for key, entry in found.items() if reason(entry) == "live"}
    again = listed(embedded(tmp_path / "b.parquet"))
    assert live == {key for key, entry in again.items() if reason(entry) == "live"}


def test_other_bytes_under_a_known_key_are_a_duplicate_not_a_caption_more(
    tmp_path: Path, pictures: list[bytes]
) -> None:
    cells = [{"bytes": image, "path": None} for image in (*pictures[:2], pictures[0])]
    table = pa.table({"image": cells, "text": ["a", "b", "c"], "id": [1, 1, 1]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = embedded(tmp_path / "a.parquet", key="id", image_suffix="png")
    report = ingested(source, tmp_path)
    assert (report.num_live, report.rejects) == (1, {"duplicate-id": 1})
    assert next(iter(source.records())).texts.decode().captions == ("a", "c")


@pytest.mark.parametrize(
    "name",
    [
        "http://127.0.0.1:9/a.png",
        "https://127.0.0.1:9/a.png",
        "ftp://127.0.0.1:9/a.png",
        "HTTP://127.0.0.1:9/a.png",
        "s3://bucket/a.png",
        "github://a:b@c/a.png",
        "simplecache::http://127.0.0.1:9/a.png",
        "filecache::file:///etc/a.png",
        "zip://a.png::/tmp/a.zip",
        "memory://a.png",
        "data:image/png;base64,AAAA",
    ],
)
def test_rows_do_not_make_the_product_fetch_what_no_recipe_allows(
    tmp_path: Path, name: str
) -> None:
    draw(tmp_path / "b.png")
    table = write_jsonl(
        tmp_path / "t.jsonl", {"file": name, "text": "x"}, {"file": "b.png", "text": "y"}
    )
    source = build("table", table=table, image="file", texts={"captions": "text"})
    entries = {reason(entry): entry for entry in source.records()}
    assert set(entries) == {"live", "forbidden-location"}
    assert "t.jsonl: line 1: file: found" in entries["forbidden-location"].detail


def test_a_recipe_allows_other_stores_and_a_table_its_own(
    tmp_path: Path, object_store: str
) -> None:
    draw(tmp_path / "a.png", tmp_path / "b.png")
    storage.write_bytes(f"{object_store}/i/a.png", (tmp_path / "a.png").read_bytes())
    rows = f'{{"file": "{object_store}/i/a.png", "text": "x"}}\n{{"file": "{tmp_path}/b.png"}}'
    (tmp_path / "t.jsonl").write_text(rows)
    storage.write_bytes(f"{object_store}/t.jsonl", rows.encode())
    here: dict[str, Any] = {"table": str(tmp_path / "t.jsonl")}
    settings: dict[str, Any] = {"image": "file", "texts": {"captions": "text"}}
    found = [reason(entry) for entry in build("table", **here, **settings).records()]
    assert sorted(found) == ["forbidden-location", "no-texts"]
    for given in (here | {"image_schemes": ["s3"]}, {"table": f"{object_store}/t.jsonl"}):
        source = build("table", **given, **settings)
        live = next(entry for entry in source.records() if reason(entry) == "live")
        assert source.read(live) == (tmp_path / "a.png").read_bytes()  # type: ignore[arg-type]


def test_one_image_by_several_names_is_one_sample(tmp_path: Path) -> None:
    draw(tmp_path / "i" / "a.png", tmp_path / "b.png")
    names = ["a.png", "./a.png", ".//a.png", "x/../a.png", "../b.png"]
    table = write_jsonl(tmp_path / "t.jsonl", *({"file": name, "text": name} for name in names))
    source = build(
        "table",
        table=table,
        images=str(tmp_path / "i"),
        image="file",
        texts={"captions": "text"},
    )
    found = captions(source)
    assert found.pop("a") == ("a.png", "./a.png", ".//a.png", "x/../a.png")
    assert list(found.values()) == [("../b.png",)]  # a table may name local files anywhere


def test_a_name_given_twice_in_a_row_rejects_the_row(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    rows = ['{"file": "a.png", "text": "x", "text": "y"}', '{"file": "a.png", "text": "text"}']
    table = write_jsonl(tmp_path / "t.jsonl", *rows)
    source = build("table", table=table, image="file", texts={"captions": "text"})
    entries = {reason(entry): entry for entry in source.records()}
    assert set(entries) == {"live", "malformed-row"}
    assert "line 1: not valid JSON: 'text' is given twice" in entries["malformed-row"].detail


def test_text_files_are_read_as_the_recipe_says_they_are_written(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "t.txt").write_bytes('file|text\na.png|"caf\u00e9\nb.png|x\n'.encode("cp1252"))
    settings: dict[str, Any] = {
        "table": str(tmp_path / "t.txt"),
        "image": "file",
        "texts": {"captions": "text"},
    }
    with pytest.raises(SourceError, match="once the recipe says its `delimiter`"):
        listed(build("table", **settings))
    form = {"delimiter": "|", "quoting": "none", "encoding": "cp1252"}
    assert captions(build("table", **settings, **form)) == {"a": ('"café',), "b": ("x",)}


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"delimiter": "||"}, "expected one character"),
        ({"delimiter": '"'}, "expected one character"),
        ({"encoding": "klingon"}, "expected an encoding"),
        ({"encoding": "base64"}, "expected an encoding"),
        ({"quoting": "some"}, "quoting"),
        ({"image_schemes": ["https"]}, "download the images"),
        ({"image_schemes": ["simplecache::s3"]}, "expected object stores"),
    ],
)
def test_forms_that_are_none_are_refused(settings: dict[str, Any], match: str) -> None:
    given: dict[str, Any] = {"table": "t", "image": "file", "texts": {"captions": "text"}}
    with pytest.raises(ConfigError, match=match):
        build("table", **given | settings)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_a_row_that_the_reader_swallows_is_found_by_the_files_own_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    draw(*(tmp_path / f"{n}.png" for n in range(4)))
    values = [{"image": f"{n}.png", "caption": "words"} for n in range(4)]
    if name == "rows.parquet":
        pq.write_table(pa.Table.from_pylist(values), tmp_path / name)
    else:
        (tmp_path / name).write_text("\n\n".join(map(json.dumps, values)))
    source = build(
        "table", table=str(tmp_path / name), image="image", texts={"captions": "caption"}
    )
    assert reasons(source) == {"live": 4}
    rows, parts = table_module.rows, table_module.parquet_parts  # type: ignore[attr-defined]

    def cut(part: TablePart) -> TablePart:
        assert part.columns is not None
        return replace(part, num_rows=part.num_rows - 1, columns=part.columns.slice(1))

    monkeypatch.setattr(table_module, "rows", lambda *given: [*rows(*given)][1:])
    monkeypatch.setattr(table_module, "parquet_parts", lambda *given: map(cut, parts(*given)))
    with pytest.raises(SourceError, match=rf"{name} has 4: of 4 entries, 3 are in"):
        ingested(source, tmp_path)
