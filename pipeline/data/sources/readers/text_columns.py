"""The mapping of table columns to texts, as a recipe states it.

A column is named by a dotted path: `answer`, or `json.answers` for a field within one. What a
cell may hold:

- captions: a string, or a list of strings.
- a question of its own columns: the words, with its answers a string or a list of strings (or of
  objects with an `answer`, as VQA has them).
- a list of questions: objects with `question` and `answers` or `answer`, and `question_id`,
  `question_type`, `answer_type` if they are there.
- dialogs: one or a list of them. A dialog is an object with `rounds` or `dialog` and a `caption`
  if there is one, or a list. The list holds objects with `question` and `answer` (and `options`,
  `gt_index`), or a chat of `role` and `content`, or `from` and `value`, in which people
  (`user`, `human`) and the other (`assistant`, `gpt`) take turns; `<image>` is left out.

A cell of text may hold lists and objects as JSON, or as Python prints them (`['a', 'b']`, which is
how pandas writes a column of lists); one that begins like such a list and is none is an error.

A cell that is null or empty says nothing. A question without an id is identified by the image and
its words, so that several rows with one answer each make one question.
"""

import ast
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field

from pipeline.config import Config
from pipeline.data.sample import Dialog, Question, Round, Texts
from pipeline.data.sources.readers.json_file import shown, unique_names

_ASKS = ("user", "human")
_REPLIES = ("assistant", "gpt")
_IMAGE_MARK = "<image>"
_LARGEST_NUMBER = (1 << 63) - 1  # of an id

_JSON = json.JSONDecoder()
_MAX_LITERAL = 1 << 20  # characters of Python's lists of other things than strings
_STRING = re.compile(r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*\"""")
_STRINGS = re.compile(r"[\[(]\s*(?:S(?:\s*,\s*|\s+|(?=[\])])))*[\])]")  # each is an S
_BESIDE = re.compile(r"S\s*S")  # which Python would make one string
_OPENED = re.compile(r"""[\[({]\s*(?:[\[({]\s*)*['"]""")
_NUMPY = re.compile(r"np\.str_\(S\)")


class TextColumns(Config):
    """The columns that hold texts, by dotted path."""

    captions: str | list[str] | None = Field(
        default=None, description="one caption, a list of them, or several columns of one each"
    )
    questions: str | None = Field(default=None, description="lists of questions with their answers")
    question: str | None = Field(
        default=None,
        description="in place of `questions`: one question, its answers in columns beside it",
    )
    answers: str | list[str] | None = Field(
        default=None, description="of `question`: a column of lists, or several columns of one each"
    )
    question_id: str | None = Field(default=None, description="of `question`: its number")
    question_type: str | None = Field(
        default=None, description="of `question`: its type, by which scores are told apart"
    )
    answer_type: str | None = Field(
        default=None, description="of `question`: its answers' type, by which scores are told apart"
    )
    dialogs: str | None = Field(
        default=None, description="lists of dialogs: rounds of a question and its answer"
    )

    def columns(self) -> list[str]:
        """Returns every column that is named."""
        given = (value for value in self.model_dump().values() if value is not None)
        return [name for value in given for name in ([value] if isinstance(value, str) else value)]

    def check(self) -> None:
        """Raises ValueError if no texts are named or one column depends on another."""
        if not (self.captions or self.questions or self.question or self.dialogs):
            raise ValueError("name a column of captions, questions, question or dialogs")
        for name in ("answers", "question_id", "question_type", "answer_type"):
            if getattr(self, name) is not None and self.question is None:
                raise ValueError(f"{name} belongs to the column `question`, which is not named")

    def texts(self, row: Mapping[str, Any], image_id: int | str) -> Texts:
        """Returns a row's texts; raises ValueError naming the column and what it holds."""
        captions = [self.captions] if isinstance(self.captions, str) else self.captions or ()
        return Texts(
            image_id=image_id,
            captions=tuple(
                caption
                for name in captions
                for caption in _strings(cell(row, name), name)
                if caption
            ),
            questions=tuple(self._questions(row, image_id)),
            dialogs=tuple(_dialogs(cell(row, self.dialogs), self.dialogs)) if self.dialogs else (),
        )

    def _questions(self, row: Mapping[str, Any], image_id: int | str) -> Iterator[Question]:
        if self.questions:
            for entry in _listed(cell(row, self.questions), self.questions):
                if not isinstance(entry, Mapping):
                    raise _unexpected(self.questions, "objects with a question", entry)
                answers = entry.get("answers", entry.get("answer"))
                yield _question(entry, answers, self.questions, image_id)
        words = cell(row, self.question) if self.question else None
        if words is None or words == "":
            return
        named = [self.answers] if isinstance(self.answers, str) else self.answers or []
        answers = [answer for name in named for answer in _listed(cell(row, name), name)]
        fields = {
            name: cell(row, column)
            for name in ("question_id", "question_type", "answer_type")
            if (column := getattr(self, name)) is not None
        }
        yield _question({"question": words, **fields}, answers, str(self.question), image_id)


def cell(row: Mapping[str, Any], path: str) -> Any:
    """Returns what a row holds at a dotted path, None if there is nothing.

    A name with a dot in it is looked for as it is before it is taken apart.
    """
    if path in row:
        return row[path]
    name, dot, rest = path.partition(".")
    value = row.get(name)
    return cell(value, rest) if dot and isinstance(value, Mapping) else None


def parsed(text: str) -> Any:
    """Returns a text cell as what it holds if that is a list or object, else itself.

    Raises ValueError if it begins as a list or object of strings and cannot be read as one.
    """
    text = text.strip()
    if text[:1] not in ("[", "{", "(") and not text.startswith("array(["):
        return text
    try:
        value, end = _JSON.raw_decode(text)
    except RecursionError:
        raise ValueError("a list that is nested too deeply") from None
    except ValueError:
        return _python_value(text)
    return value if end == len(text) else text  # words after a bracket


def _python_value(text: str) -> Any:
    """Returns the list or dict that a text is in Python's notation, else the text itself."""
    skeleton = _NUMPY.sub("S", _STRING.sub("S", text.replace("S", "s")))
    if _STRINGS.fullmatch(skeleton) and (text[0] == "[" or "," in skeleton):
        return [_literal(string) for string in _STRING.findall(text)]
    if not _OPENED.match(text):
        if text.startswith("array(["):
            raise ValueError(f"a printed array, which is no list: {shown(text)}")
        return text
    value = None
    if len(text) <= _MAX_LITERAL and not _BESIDE.search(skeleton):
        value = _literal(text)
    if isinstance(value, list | dict):
        return value
    closing = {"[": "]", "{": "}", "(": ")"}[text[0]]
    if text[0] == "(" or (closing in skeleton and not skeleton.endswith(closing)):
        return text  # a bracket at the beginning of a sentence
    raise ValueError(f"begins as a list of strings and cannot be read as one: {shown(text)}")


def _literal(text: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes that Python does not know
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def json_object(text: str) -> dict[str, Any]:
    """Returns the object that JSON holds, or raises ValueError, also if a name stands twice."""
    try:
        value = json.loads(text, object_pairs_hook=unique_names)
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {shown(value)}")
    return value


def gathered(all_texts: Sequence[Texts]) -> Texts:
    """Returns the texts of one image from several rows.

    Questions of one id are one question with all their answers, in the order of the rows.
    """
    questions: dict[int | str, Question] = {}
    for question in (question for texts in all_texts for question in texts.questions):
        known = questions.setdefault(question.question_id, question)
        if known is not question:
            answers = known.answers + question.answers
            questions[question.question_id] = replace(known, answers=answers)
    return Texts(
        image_id=all_texts[0].image_id,
        captions=tuple(caption for texts in all_texts for caption in texts.captions),
        questions=tuple(questions.values()),
        dialogs=tuple(dialog for texts in all_texts for dialog in texts.dialogs),
    )


def _question(entry: Mapping[str, Any], answers: Any, name: str, image_id: int | str) -> Question:
    words = entry.get("question")
    if not isinstance(words, str) or not words.strip():
        raise _unexpected(name, "a question's words", words)
    found = []
    for answer in _listed(answers, f"{name}'s answers"):
        if isinstance(answer, Mapping):
            answer = answer.get("answer")
        number = type(answer) in (int, float) and -_LARGEST_NUMBER <= answer <= _LARGEST_NUMBER
        if not isinstance(answer, str) and not number:
            raise _unexpected(f"{name}'s answers", "strings", answer)
        found.append(str(answer))
    question_id = entry.get("question_id")
    if question_id is None:
        question_id = f"{image_id}: {words.strip()}"
    whole = type(question_id) is int and abs(question_id) <= _LARGEST_NUMBER
    if not isinstance(question_id, str) and not whole:
        raise _unexpected(f"{name}'s question_id", "a number or a string", question_id)
    return Question(
        question_id=question_id,
        question=words.strip(),
        answers=tuple(found),
        question_type=_name(entry, "question_type", name),
        answer_type=_name(entry, "answer_type", name),
    )


def _name(entry: Mapping[str, Any], field: str, name: str) -> str:
    value = entry.get(field)
    if value is None:
        return ""
    if not isinstance(value, str) and type(value) is not int:
        raise _unexpected(f"{name}'s {field}", "a string", value)
    return str(value)


def _dialogs(value: Any, name: str) -> Iterator[Dialog]:
    value = _read(value, name)
    if value is None or value == "" or (isinstance(value, list) and not value):
        return
    several = isinstance(value, list) and (
        isinstance(value[0], list)
        or (isinstance(value[0], Mapping) and ("rounds" in value[0] or "dialog" in value[0]))
    )
    for dialog in value if several else [value]:
        caption, turns = "", dialog
        if isinstance(dialog, Mapping):
            caption, turns = dialog.get("caption") or "", dialog.get("rounds", dialog.get("dialog"))
        if not isinstance(caption, str) or not isinstance(turns, list):
            raise _unexpected(name, "a list of rounds", dialog)
        if turns:
            yield Dialog(caption.strip(), tuple(_rounds(turns, name)))


def _rounds(turns: list[Any], name: str) -> Iterator[Round]:
    asked: str | None = None
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise _unexpected(name, "rounds that are objects", turn)
        if "question" in turn:
            question, answer = turn["question"], turn.get("answer")
            if not isinstance(question, str) or not isinstance(answer, str):
                raise _unexpected(name, "rounds of question and answer", turn)
            yield Round(question.strip(), answer.strip(), *_options(turn, name))
            continue
        role, words = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(words, str):
            raise _unexpected(name, "turns of role and content", turn)
        words = words.replace(_IMAGE_MARK, "").strip()
        if role in _ASKS and asked is None:
            asked = words
        elif role in _REPLIES and asked is not None:
            yield Round(asked, words)
            asked = None
        elif role != "system":
            raise _unexpected(name, "people and the other in turns, people first", turn)
    if asked is not None:
        raise _unexpected(name, "an answer to the last turn", asked)


def _options(turn: Mapping[str, Any], name: str) -> tuple[tuple[str, ...], int, tuple[float, ...]]:
    """Returns a round's options, which of them is the answer, or -1, and their relevance."""
    options, gt_index = turn.get("options"), turn.get("gt_index")
    relevance = turn.get("relevance")
    options, relevance = [] if options is None else options, [] if relevance is None else relevance
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise _unexpected(name, "options that are strings", options)
    if gt_index is not None and (type(gt_index) is not int or not -1 <= gt_index < len(options)):
        raise _unexpected(name, f"a gt_index below {len(options)}", gt_index)
    if not isinstance(relevance, list) or not all(
        type(value) in (int, float) and 0 <= value <= 1 for value in relevance
    ):
        raise _unexpected(name, "relevance in numbers from 0 to 1", relevance)
    if relevance and len(relevance) != len(options):
        raise _unexpected(name, f"relevance of each of {len(options)} options", relevance)
    return tuple(options), -1 if gt_index is None else gt_index, tuple(map(float, relevance))


def _strings(value: Any, name: str) -> list[str]:
    values = _listed(value, name)
    for entry in values:
        if not isinstance(entry, str):
            raise _unexpected(name, "a string or a list of strings", entry)
    return [entry.strip() for entry in values]


def _read(value: Any, name: str) -> Any:
    try:
        return parsed(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _listed(value: Any, name: str) -> list[Any]:
    value = _read(value, name)
    if value is None or value == "":
        return []
    if isinstance(value, Mapping) and value and all(isinstance(v, list) for v in value.values()):
        # Arrow and Hugging Face turn a list of objects into an object of lists.
        columns = {len(column) for column in value.values()}
        if len(columns) != 1:
            raise _unexpected(name, "lists of one length", value)
        return [dict(zip(value, entry, strict=True)) for entry in zip(*value.values(), strict=True)]
    return list(value) if isinstance(value, list | tuple) else [value]


def _unexpected(name: str, expected: str, found: Any) -> ValueError:
    return ValueError(f"{name}: expected {expected}, found {shown(found)}")
