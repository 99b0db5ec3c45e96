import gzip
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline.data.sources.readers.json_file import (
    Fields,
    Groups,
    JsonList,
    read_json,
    read_json_list,
    read_text,
    shown,
)
from pipeline.errors import SourceError

DOCUMENT = {
    "info": {"year": 2014},
    "data": {"items": [{"id": 3, "w": "a"}, {"id": "3", "w": "b"}, {"id": 3, "w": "ü"}], "n": [1]},
    "empty": [],
    "flag": None,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.json"


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_lists_are_what_json_says_they_are(path: Path, indent: int | None, packed: bool) -> None:
    payload = json.dumps(DOCUMENT, indent=indent, ensure_ascii=False).encode()
    path.write_bytes(gzip.compress(payload) if packed else payload)
    document = read_json(str(path), "a test file")
    items = document.list("data", "items")
    assert [*items.each(lambda entry: entry.values)] == DOCUMENT["data"]["items"]  # type: ignore[index]
    assert items.object(2).where == f"{path}: data.items[2]"
    assert len(document.list("empty")) == 0
    assert document.values["info"] == {"year": 2014}
    assert document.values["flag"] is None


@pytest.mark.parametrize("odd", ["NaN", "1e999", "-Infinity", '"\\ud83d"', "1" * 30, "-0.0"])
def test_values_that_python_reads_are_read_as_python_reads_them(path: Path, odd: str) -> None:
    text = f'\ufeff [{{"id": 1, "v": [{odd}]}}, {{"id": 2}}]'
    path.write_text(text)
    items = read_json_list(str(path), "a test file")
    assert repr([items[0], items[1]]) == repr(json.loads(text.removeprefix("\ufeff")))
    assert [key for key, _ in Groups(items, "id")] == [1, 2]


def test_structs_hold_what_the_fields_do_and_faults_are_named_by_the_fields(path: Path) -> None:
    class Named(msgspec.Struct):
        id: int | str
        name: str

    def checked(entry: Fields) -> Named:
        return Named(entry.identity("id"), entry.string("name"))

    for odd in ("0", "NaN"):  # unparsed until asked for, and parsed by Python's own reader
        path.write_text(
            f'[{{"id": "a", "more": {odd}, "name": "x"}}, {{"id": 1.5, "name": ""}}, {{"id": 2}}]'
        )
        read = read_json_list(str(path), "a test file").reader(Named, checked)
        assert read(0) == Named("a", "x")
        with pytest.raises(SourceError, match=r"\[1\]: 'id': expected a number or a string"):
            read(1)
        with pytest.raises(SourceError, match=r"\[2\]: expected a field 'name', found 'id'"):
            read(2)


def test_objects_are_grouped_by_a_field_with_numbers_apart_from_their_names(path: Path) -> None:
    path.write_text(json.dumps(DOCUMENT))
    groups = Groups(read_json(str(path), "a test file").list("data", "items"), "id")
    assert [(key, [entry.string("w") for entry in found]) for key, found in groups] == [
        (3, ["a", "ü"]),
        ("3", ["b"]),
    ]
    assert [entry.string("w") for entry in groups.of("3")] == ["b"]
    assert groups.of(4) == []


def test_groups_keep_the_order_of_first_appearance(path: Path) -> None:
    ids = [7, 1, 9, 1, 4, 7]
    path.write_text(json.dumps([{"id": number} for number in ids]))
    items = read_json_list(str(path), "a test file")
    groups = Groups(items, "id")
    assert [key for key, _ in groups] == [7, 1, 9, 4]
    assert [(key, len(found)) for key, found in groups.beside({9, 1, "7"})] == [(7, 2), (4, 1)]


def test_an_empty_list_has_no_groups(path: Path) -> None:
    path.write_text("[]")
    groups = Groups(read_json_list(str(path), "a test file"), "id")
    assert list(groups) == list(groups.beside({1})) == []
    assert groups.of(1) == []


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not valid JSON: Expecting value: line 1"),
        ('{"a": [1, 2', "not valid JSON.*line 1 column"),
        ('{"a": [1 2]}', "Expecting ',' delimiter"),
        ('{"a": [1,]}', "not valid JSON"),
        ('{"a" 1}', "Expecting ':' delimiter"),
        ('{"a": 1,}', "not valid JSON"),
        ('{"a": 1} x', "Extra data"),
        ("{1: 2}", "Expecting property name"),
        ("[1]", "expected an object, found a list"),
        ("3", "expected an object, found a int"),
        ('{"b": 1}', "expected a list 'a'; the file has the keys 'b'. Is it a test file?"),
        ('{"a": 1}', "expected a list 'a', found 1"),
    ],
)
def test_what_is_not_the_expected_json_is_named(path: Path, text: str, match: str) -> None:
    path.write_text(text)
    with pytest.raises(SourceError, match=match):
        read_json(str(path), "a test file").list("a")


def test_packed_or_encoded_badly_is_named(path: Path) -> None:
    path.write_bytes(gzip.compress(b"[]")[:-6])
    with pytest.raises(SourceError, match="cannot be unpacked"):
        read_text(str(path))
    path.write_bytes(b'["x",\n"\xff"]')
    with pytest.raises(SourceError, match="line 2: not UTF-8"):
        read_text(str(path))
    path.write_bytes('["x"]'.encode("utf-16"))
    with pytest.raises(SourceError, match="iconv -f UTF-16"):
        read_text(str(path))


def test_fields_are_checked(path: Path) -> None:
    path.write_text('[{"id": true, "n": 5, "s": 1, "l": [1], "t": "\\ud800"}, 4]')
    items = read_json_list(str(path), "a test file")
    entry = items.object(0)
    with pytest.raises(SourceError, match=r"\[0\]: 'id': expected a number or a string"):
        entry.identity("id")
    with pytest.raises(SourceError, match="a whole number from 0 to 4, found 5"):
        entry.integer("n", 5)
    with pytest.raises(SourceError, match="a string, found 1"):
        entry.string("s")
    with pytest.raises(SourceError, match="surrogate"):
        entry.string("t")
    with pytest.raises(SourceError, match=r"l\[0\]: expected an object, found 1"):
        list(entry.objects("l"))
    with pytest.raises(SourceError, match="a list, found 5"):
        entry.list("n")
    with pytest.raises(SourceError, match=r"field 'x', found 'id', 'n'.*Is it a test file"):
        entry.get("x")
    with pytest.raises(SourceError, match=r"\[1\]: expected an object, found 4"):
        items.object(1)
    with pytest.raises(SourceError, match="expected strings, found"):
        items.strings()


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("5", "expected an object, found 5"),
        ('{"w": "x"}', "expected a field 'id', found 'w'"),
        ('{"id": null}', "'id': expected a number or a string, found None"),
        ('{"id": 1e999}', "'id': expected a number or a string, found inf"),
        ('{"id": "\\ud800"}', "'id': '\\ud800' holds half a surrogate pair"),
        (f'{{"id": {"9" * 400}}}', "'id': expected a number or a string, found a number of 1329"),
        (f'{{"id": 7, "w": {"9" * 5000}}}', "not valid JSON: Exceeds the limit"),
    ],
)
def test_a_faulty_object_of_a_list_costs_itself(path: Path, text: str, detail: str) -> None:
    path.write_text(f'[{{"id": 1, "w": "a"}}, {text}, {{"id": 2, "w": "b"}}]')
    items = read_json_list(str(path), "a test file")
    groups = Groups(items, "id")
    assert [entry.get("w") for _, found in groups for entry in found] == ["a", "b"]
    assert [entry.get("w") for entry in groups.of(7)] == []
    (reject,) = items.rejects("test")
    assert (reject.reason, reject.split) == ("malformed-record", "test")
    assert f"{path}[1]: {detail}" in reject.detail
    assert [reject] == list(items.rejects("test"))
    assert reject.key != next(items.rejects("train")).key


def test_a_list_of_which_all_objects_are_faulty_is_another_file(path: Path) -> None:
    path.write_text('[{"a": 1}, {"a": 2}]')
    items = read_json_list(str(path), "a test file")
    assert list(Groups(items, "id")) == []
    with pytest.raises(SourceError, match=r"\[0\]: expected a field 'id', found 'a'"):
        list(items.rejects(""))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('{"a": [1], "b": 2, "a": [2]}', "the file has 'a' twice"),
        ('{ "a" : [1] ,\n "a" : [1] }', "the file has 'a' twice"),
        ('{"a": [1, 2, 3], "a": []}', "the file has 'a' twice"),
        ('{"b": {"a": "}, \\"a\\": 1", "c": {}, "a": 2}}', "b has 'a' twice"),
        ('{"a": "x", "\\u0061": "y"}', "the file has 'a' twice"),
    ],
)
def test_a_name_that_stands_twice_is_an_error_not_the_last_of_its_values(
    path: Path, text: str, name: str
) -> None:
    path.write_text(text)
    with pytest.raises(SourceError, match=name):
        read_json(str(path), "a test file")


def test_nesting_beyond_what_can_be_read_is_one_sentence(path: Path) -> None:
    for text in ("[" * 100_000, '{"a": ' * 100_000, f'[{{"a": {"[" * 50_000}{"]" * 50_000}}}]'):
        path.write_text(text)
        with pytest.raises(SourceError, match="not valid JSON: nested too deeply"):
            read_json(str(path), "a test file")


def test_whatever_is_shown_is_short() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, 10**6000, "x" * 10_000, "\ud800", {"a": [1] * 1000}, float("nan")):
        assert 0 < len(shown(value).encode()) < 90


def test_the_official_file_reads_as_json_reads_it(shared_data: Path) -> None:
    location = shared_data / "vqa_v2" / "v2_OpenEnded_mscoco_train2014_questions.json.gz"
    questions = read_json(str(location), "a VQA v2 questions file").list("questions")
    assert isinstance(questions, JsonList)
    with gzip.open(location) as file:
        assert [*questions.each(lambda entry: entry.values)] == json.load(file)["questions"]
