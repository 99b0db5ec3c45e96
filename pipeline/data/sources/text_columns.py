"""Texts in people's own tables: a recipe says which column holds what, and rows become `Texts`.

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

A cell that is null or empty says nothing. A question without an id is identified by the image and
its words, so that several rows with one answer each make one question.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.config import Config
from pipeline.data.sample import Dialog, Question, Round, Texts

_ASKS = ("user", "human")
_REPLIES = ("assistant", "gpt")
_IMAGE_MARK = "<image>"


class TextColumns(Config):
    """The columns that hold texts, by dotted path."""

    captions: str | list[str] | None = None
    questions: str | None = None  # lists of questions with their answers
    question: str | None = None  # or one question, and its answers in columns beside it
    answers: str | list[str] | None = None  # a column of lists, or several columns of one each
    question_id: str | None = None
    question_type: str | None = None
    answer_type: str | None = None
    dialogs: str | None = None

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
    """Returns a text cell as the JSON it holds if it looks like a list or object, else itself."""
    if text[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def json_object(text: str) -> dict[str, Any]:
    """Returns the object that JSON holds, or raises ValueError."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {repr(value)[:80]}")
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
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise _unexpected(f"{name}'s answers", "strings", answer)
        found.append(str(answer))
    question_id = entry.get("question_id")
    if question_id is None:
        question_id = f"{image_id}: {words.strip()}"
    if isinstance(question_id, bool) or not isinstance(question_id, int | str):
        raise _unexpected(f"{name}'s question_id", "a number or a string", question_id)
    return Question(
        question_id=question_id,
        question=words.strip(),
        answers=tuple(found),
        question_type=str(entry.get("question_type") or ""),
        answer_type=str(entry.get("answer_type") or ""),
    )


def _dialogs(value: Any, name: str) -> Iterator[Dialog]:
    value = parsed(value) if isinstance(value, str) else value
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
            options, gt_index = turn.get("options") or (), turn.get("gt_index")
            relevance = turn.get("relevance") or ()
            if not isinstance(question, str) or not isinstance(answer, str):
                raise _unexpected(name, "rounds of question and answer", turn)
            if not all(isinstance(option, str) for option in options):
                raise _unexpected(name, "options that are strings", options)
            yield Round(
                question=question.strip(),
                answer=answer.strip(),
                options=tuple(options),
                gt_index=-1 if gt_index is None else int(gt_index),
                relevance=tuple(map(float, relevance)),
            )
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


def _strings(value: Any, name: str) -> list[str]:
    values = _listed(value, name)
    for entry in values:
        if not isinstance(entry, str):
            raise _unexpected(name, "a string or a list of strings", entry)
    return [entry.strip() for entry in values]


def _listed(value: Any, name: str) -> list[Any]:
    value = parsed(value) if isinstance(value, str) else value
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
    return ValueError(f"{name}: expected {expected}, found {repr(found)[:80]}")
