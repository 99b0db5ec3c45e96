import json
from typing import Any

import pytest

from pipeline.data.sample import Dialog, Question, Round, Texts
from pipeline.data.sources.readers.text_columns import TextColumns, cell, gathered

EARLIER, LATER = Round("is it red?", "no"), Round("is it big?", "yes")


def test_captions_are_strings_or_lists_of_them_in_one_column_or_several() -> None:
    columns = TextColumns(captions=["a", "b.c", "d"])
    row = {"a": "one ", "b": {"c": ["two", ""]}, "d": None}
    assert columns.texts(row, 7) == Texts(7, ("one", "two"))


def test_a_question_may_have_its_answers_beside_it() -> None:
    columns = TextColumns(question="q", answers=["a", "b"], question_id="id", answer_type="t")
    row = {"q": "what? ", "a": ["x", "y"], "b": "z", "id": 4, "t": "other"}
    assert columns.texts(row, 7).questions == (Question(4, "what?", ("x", "y", "z"), "", "other"),)
    assert columns.texts({"q": None}, 7).questions == ()


@pytest.mark.parametrize(
    "value",
    [
        [{"question": "what?", "answers": ["x", "y"], "question_id": "i"}],
        [{"question": "what?", "answers": [{"answer": "x"}, {"answer": "y"}], "question_id": "i"}],
        {"question": ["what?"], "answers": [["x", "y"]], "question_id": ["i"]},
        '[{"question": "what?", "answers": ["x", "y"], "question_id": "i"}]',
    ],
)
def test_questions_may_be_a_list_in_one_column(value: Any) -> None:
    texts = TextColumns(questions="qa").texts({"qa": value}, 7)
    assert texts.questions == (Question("i", "what?", ("x", "y")),)


@pytest.mark.parametrize(
    "value",
    [
        [{"question": "is it red?", "answer": "no"}, {"question": "is it big?", "answer": "yes"}],
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "<image>\nis it red?"},
            {"role": "assistant", "content": "no"},
            {"role": "user", "content": "is it big?"},
            {"role": "assistant", "content": "yes"},
        ],
        [
            {"from": "human", "value": "is it red?\n<image>"},
            {"from": "gpt", "value": "no"},
            {"from": "human", "value": "is it big?"},
            {"from": "gpt", "value": "yes"},
        ],
    ],
)
def test_dialogs_are_rounds_or_chats(value: Any) -> None:
    columns = TextColumns(dialogs="d")
    assert columns.texts({"d": value}, 7).dialogs == (Dialog("", (EARLIER, LATER)),)
    assert columns.texts({"d": [value, value]}, 7).dialogs == (Dialog("", (EARLIER, LATER)),) * 2
    captioned = {"caption": "a ball", "rounds": value}
    assert columns.texts({"d": captioned}, 7).dialogs == (Dialog("a ball", (EARLIER, LATER)),)


def test_texts_as_samples_hold_them_read_back_as_they_were() -> None:
    rounds = (Round("q", "b", ("a", "b"), 1, (0.0, 0.5)), LATER)
    texts = Texts(7, ("a",), (Question(1, "q", ("x",), "t", "other"),), (Dialog("c", rounds),))
    columns = TextColumns(captions="captions", questions="questions", dialogs="dialogs")
    assert columns.texts(json.loads(texts.to_json()), 7) == texts


@pytest.mark.parametrize(
    ("columns", "row", "match"),
    [
        ({"captions": "c"}, {"c": 3}, "c: expected a string or a list of strings, found 3"),
        ({"captions": "c"}, {"c": ["a", None]}, "found None"),
        ({"question": "q"}, {"q": 4}, "q: expected a question's words, found 4"),
        ({"question": "q", "answers": "a"}, {"q": "x", "a": [None]}, "q's answers: expected str"),
        ({"questions": "q"}, {"q": ["what?"]}, "q: expected objects with a question"),
        ({"questions": "q"}, {"q": {"question": ["a"], "answers": []}}, "lists of one length"),
        ({"dialogs": "d"}, {"d": "hello"}, "d: expected a list of rounds"),
        ({"dialogs": "d"}, {"d": [{"question": "x"}]}, "rounds of question and answer"),
        ({"dialogs": "d"}, {"d": [{"role": "assistant", "content": "x"}]}, "people first"),
        ({"dialogs": "d"}, {"d": [{"role": "user", "content": "x"}]}, "an answer to the last turn"),
    ],
)
def test_cells_of_another_shape_are_named(
    columns: dict[str, Any], row: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        TextColumns(**columns).texts(row, 7)


@pytest.mark.parametrize(
    ("columns", "match"), [({}, "name a column"), ({"captions": "c", "answers": "a"}, "belongs to")]
)
def test_columns_that_depend_on_others_are_checked(columns: dict[str, str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TextColumns(**columns).check()


def test_a_path_is_looked_for_whole_before_it_is_taken_apart() -> None:
    assert cell({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert cell({"a": {"b": {"c": 2}}}, "a.b.c") == 2
    assert cell({"a": "b"}, "a.b") is None


def test_rows_of_one_question_give_it_all_their_answers() -> None:
    columns = TextColumns(captions="c", question="q", answers="a")
    rows: list[dict[str, Any]] = [
        {"c": "same", "q": "what?", "a": "x"},
        {"c": "same", "q": "why?", "a": "y"},
        {"c": None, "q": "what?", "a": "z"},
    ]
    texts = gathered([columns.texts(row, 7) for row in rows])
    assert texts.captions == ("same", "same")
    assert [(asked.question_id, asked.answers) for asked in texts.questions] == [
        ("7: what?", ("x", "z")),
        ("7: why?", ("y",)),
    ]


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        ("['a dog runs', 'a brown dog']", ("a dog runs", "a brown dog")),
        ("[\"the dog's ball\", 'two balls']", ("the dog's ball", "two balls")),
        ("['a' 'b'\n 'c']", ("a", "b", "c")),  # of a NumPy array
        ("[np.str_('a'), np.str_('b')]", ("a", "b")),
        ("('a', 'b')", ("a", "b")),
        (' ["a", "b"] ', ("a", "b")),
        ("[laughs] hello", ("[laughs] hello",)),
        ('["No entry"] says a sign', ('["No entry"] says a sign',)),
        ("('quoted') words", ("('quoted') words",)),
        ("{smile} hi", ("{smile} hi",)),
        ("[]", ()),
    ],
)
def test_a_cell_may_hold_a_list_as_json_or_python_writes_it(
    text: str, captions: tuple[str, ...]
) -> None:
    assert TextColumns(captions="c").texts({"c": text}, 7).captions == captions


@pytest.mark.parametrize(
    "text",
    [
        "['a', 'b'",
        '["a", "b"',
        "['it's', 'b']",
        "['a''b']",
        "['a', nan]",
        "['a', None]",
        "{'a', 'b'}",
        "['a', ..., 'b']",
        "array(['a', 'b'], dtype=object)",
        "[" * 5000,
        "[['a'" + "," + "-" * 50_000,
    ],
)
def test_a_list_that_cannot_be_read_is_no_caption(text: str) -> None:
    with pytest.raises(ValueError, match="c: "):
        TextColumns(captions="c").texts({"c": text}, 7)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("answers", 1e999),
        ("answers", float("nan")),
        ("answers", [10**5000]),
        ("id", 10**30),
        ("type", {"a": 1}),
        ("dialog", [{"question": "q", "answer": "a", "gt_index": 1e999}]),
        ("dialog", [{"question": "q", "answer": "a", "options": "abc"}]),
        ("dialog", [{"question": "q", "answer": "a", "options": ["x"], "gt_index": 1}]),
        ("dialog", [{"question": "q", "answer": "a", "options": ["x"], "relevance": [10**400]}]),
        ("dialog", [{"question": "q", "answer": "a", "options": ["x"], "relevance": [1, 1]}]),
    ],
)
def test_numbers_and_lists_beyond_their_bounds_name_the_column(column: str, value: Any) -> None:
    columns = TextColumns(
        question="q", answers="answers", question_id="id", question_type="type", dialogs="dialog"
    )
    with pytest.raises(ValueError, match=r"(q|dialog)(: |'s )"):
        columns.texts({"q": "what?", column: value}, 7)
