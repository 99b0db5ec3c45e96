import csv
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.data.sources.readers.delimited import Delimited, Quoting, TextForm
from pipeline.errors import SourceError

STRAY = (
    "image\tcaption\n"
    "a.jpg\ta red square\n"
    'b.jpg\t"Stop" is what the driver shouted\n'
    'c.jpg\t"Go on, said the green man\n'
    "d.jpg\ta yellow square\n"
    'e.jpg\ta 12" black square\n'
)


def read(
    path: Path, text: str | bytes, columns: Sequence[str] = ("image", "caption"), **form: str
) -> list[tuple[int, Sequence[str], str]]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    table = Delimited(str(path), TextForm(**form), columns, "image")  # type: ignore[arg-type]
    return [(line.number, [] if line.fault else line.cells, line.fault) for line in table.rows()]


def cells(path: Path, text: str | bytes, **form: str) -> list[Sequence[str]]:
    found = read(path, text, **form)
    assert not any(fault for _, _, fault in found)
    return [row for _, row, _ in found]


def test_marks_that_quote_nothing_stay_in_the_text(tmp_path: Path) -> None:
    assert cells(tmp_path / "t.tsv", STRAY) == [
        ["a.jpg", "a red square"],
        ["b.jpg", '"Stop" is what the driver shouted'],
        ["c.jpg", '"Go on, said the green man'],
        ["d.jpg", "a yellow square"],
        ["e.jpg", 'a 12" black square'],
    ]


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_what_a_csv_writer_wrote_is_read_as_it_was(tmp_path: Path, delimiter: str) -> None:
    rows = [
        ["image", "caption"],
        ["a.jpg", 'he said "go", and went'],
        ["b.jpg", "two\nlines, and; more | of\tit"],
        ["c.jpg", '"'],
        ["d.jpg", '""quoted""'],
        ["e.jpg", "plain"],
    ]
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        path = tmp_path / "t.csv"
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter=delimiter, quoting=quoting).writerows(rows)
        assert cells(path, path.read_bytes(), delimiter=delimiter) == rows[1:]


@pytest.mark.parametrize("last", ["x.jpg,he is 6'2\"", 'x.jpg,"quoted"'])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_rows_never_disappear_into_one_cell(tmp_path: Path, last: str, name: str) -> None:
    """A mark that opens a cell in one row, and one that ends a line further down."""
    text = f'image,caption\na.jpg,"go on\nb.jpg,words\n{last}\n'
    text = text.replace(",", "\t") if name == "t.tsv" else text
    found = cells(tmp_path / name, text)
    assert [row[0] for row in found] == ["a.jpg", "b.jpg", "x.jpg"]
    text = text.replace("words", "words\tand,more")
    with pytest.raises(SourceError, match=r"line 2: .*line 3 has 3 cells.*quoting: none"):
        cells(tmp_path / name, text)


def test_rows_of_images_without_a_suffix_do_not_disappear_either(tmp_path: Path) -> None:
    found = cells(tmp_path / "t.csv", 'image,caption\n1,"go on\n2,words\n3,he is 6\'2"\n')
    assert [row[0] for row in found] == ["1", "2", "3"]
    text = 'image,caption\n1,"two lines,\nof it"\n2,x\n'
    assert cells(tmp_path / "t.csv", text) == [["1", "two lines,\nof it"], ["2", "x"]]


def test_a_file_that_can_be_read_neither_way_is_refused_with_the_key(tmp_path: Path) -> None:
    text = STRAY.replace("\t", ",")
    with pytest.raises(SourceError, match=r"t\.csv: line 3: words follow .* line 4 has 3 cells"):
        read(tmp_path / "t.csv", text)
    found = read(tmp_path / "t.csv", text, quoting="csv")
    assert [(number, bool(fault)) for number, _, fault in found] == [
        (2, False),
        (3, True),
        (4, True),
        (5, False),
        (6, False),
    ]
    found = read(tmp_path / "t.csv", text, quoting="none")
    assert [number for number, _, fault in found if fault] == [4]
    assert found[1][1] == ["b.jpg", '"Stop" is what the driver shouted']


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_marks_behind_backslashes_are_named(tmp_path: Path, delimiter: str) -> None:
    lines = ["image,caption", 'a.jpg,"a"', 'b.jpg,"the \\"go\\" sign"', "c.jpg,x"]
    text = "\n".join(lines).replace(",", delimiter)
    form = {"delimiter": delimiter}
    with pytest.raises(SourceError, match=r"t\.csv: line 3: .* as Spark and MySQL write them"):
        read(tmp_path / "t.csv", text, **form)
    found = cells(tmp_path / "t.csv", text, quoting="none", **form)
    assert found[1] == ["b.jpg", '"the \\"go\\" sign"']
    text = text.replace('"the', 'see "the')
    assert cells(tmp_path / "t.csv", text, **form)[1] == ["b.jpg", 'see "the \\"go\\" sign"']


def test_an_open_mark_costs_its_own_line_however_much_follows(tmp_path: Path) -> None:
    lines = ["image,caption", 'a.jpg,"open', *(f"{n}.jpg,words" for n in range(3000))]
    found = read(tmp_path / "t.csv", "\n".join(lines), quoting="csv")
    assert len(found) == 3001
    assert [number for number, _, fault in found if fault] == [2]
    assert "opens a cell that none closes" in found[0][2]


def test_short_and_long_rows_are_named_by_their_lines(tmp_path: Path) -> None:
    text = 'image,caption\na.jpg,"two\nlines"\n\nb.jpg\nc.jpg,x,y\nd.jpg,z\n'
    assert [(number, fault) for number, _, fault in read(tmp_path / "t.csv", text)] == [
        (2, ""),
        (5, "expected 2 cells, found 1"),
        (6, "expected 2 cells, found 3"),
        (7, ""),
    ]


def test_kaggles_flickr30k_is_read_with_its_delimiter(tmp_path: Path) -> None:
    text = (
        "image_name| comment_number| comment\n"
        '1.jpg| 0| Two men , "friends" , look on .\n'
        '1.jpg| 1| " A man " waits .\n'
        "2199200615.jpg| 4   A dog runs across the grass .\n"
        "2.jpg| 0| A dog .\n"
    )
    columns = ("image_name", "comment")

    def rows(quoting: Quoting) -> list[tuple[int, Sequence[str], str]]:
        path = tmp_path / "results.csv"
        path.write_text(text)
        form = TextForm(delimiter="|", quoting=quoting)
        table = Delimited(str(path), form, columns, "image_name")
        return [(line.number, line.cells, line.fault) for line in table.rows()]

    with pytest.raises(SourceError, match=r"line 3: words follow .* line 4 has 2 cells and not 3"):
        rows("auto")
    found = rows("none")
    assert [(number, fault) for number, _, fault in found if fault] == [
        (4, "expected 3 cells, found 2")
    ]
    assert found[1][1] == ["1.jpg", "1", '" A man " waits .']


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_line_ends_and_byte_order_marks_are_known(tmp_path: Path, end: str, encoding: str) -> None:
    text = end.join(["image,caption", 'a.jpg,"ü, ""x"""', "b.jpg,y"])
    assert cells(tmp_path / "t.csv", text.encode(encoding)) == [["a.jpg", 'ü, "x"'], ["b.jpg", "y"]]


def test_other_encodings_are_named_by_the_recipe(tmp_path: Path) -> None:
    text = "image,caption\na.jpg,café\nb.jpg,y\n"
    assert cells(tmp_path / "t.csv", text.encode("cp1252"), encoding="cp1252")[0][1] == "café"
    (first, second) = read(tmp_path / "t.csv", text.encode("cp1252"))
    assert "byte 0xe9 is not UTF-8" in first[2]
    assert "`encoding` names it" in first[2]
    assert second == (3, ["b.jpg", "y"], "")
    with pytest.raises(SourceError, match="encoding: utf-16-le"):
        read(tmp_path / "t.csv", text.encode("utf-16-le"))
    assert len(cells(tmp_path / "t.csv", text.encode("utf-16-le"), encoding="utf-16-le")) == 2
    assert "NUL" in read(tmp_path / "t.csv", "image,caption\na.jpg,x\0y\n")[0][2]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("image;caption\n", "no column 'image'; .* `delimiter: ';'` separates them"),
        ("image|caption\n", "`delimiter: '|'` separates them"),
        ("image\tcaption\n", r"`delimiter: '\\t'` separates them"),
        ("image,caption,caption\n", "line 1: 2 columns are called 'caption'"),
        ("", "no column 'image'; there are none"),
        ('"image,caption\n', "line 1: a quotation mark opens a cell that none closes"),
    ],
)
def test_headers_that_are_none_are_named(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(SourceError, match=match.replace("|", r"\|")):
        read(tmp_path / "t.csv", text)


def test_columns_that_no_recipe_names_may_share_a_name(tmp_path: Path) -> None:
    assert cells(tmp_path / "t.csv", "image,caption,,\na.jpg,x,1,2\n") == [["a.jpg", "x", "1", "2"]]
