"""The VisDial v1.0 format: dialogs about numbered images, each answer among 100 options.

Questions, answers and options are numbers into two lists of the file; here each round gets its
words. Dense annotations give one round of a dialog the relevance of each option; their
`round_id` counts from 1. What becomes of each image that dialogs are about:

- its file is there: a sample with its dialogs.
- its file is not there: a `missing-image` reject; its name is not an image's: `unknown-suffix`.
- its dialogs have no round: `no-rounds`.
- dense annotations of an image without a dialog: an `unknown-image` reject.
- a dialog or a dense annotation that is not what the format says: a `malformed-record`, which
  costs itself.

The last round of a test dialog has options but neither an answer nor `gt_index`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, Self

import msgspec
from pydantic import Field, model_validator

from pipeline import storage
from pipeline.data.sample import Dialog, Round, Texts
from pipeline.data.sources.base import (
    Record,
    Reject,
    SourceConfig,
    by_key,
    without_texts,
)
from pipeline.data.sources.image_files import ImageFolders, image_key, listed, read_image
from pipeline.data.sources.readers.json_file import (
    Fields,
    Groups,
    Identity,
    read_json,
    read_json_list,
    shown,
)
from pipeline.data.sources.splits import check_splits, folders_of, hash_split, validation_share
from pipeline.reason import Reason

_DIALOGS = "a VisDial v1.0 file"
_DENSE = "a VisDial v1.0 dense annotations file"
_RELEVANCE = ("gt_relevance", "relevance")  # what val's and train's dense annotations call it


class VisdialSourceConfig(SourceConfig):
    """Where the files are, and how the images of a single file are split."""

    type: Literal["visdial"] = Field(description="VisDial's dialogs")
    images: str | list[str] | dict[str, str | list[str]] = Field(
        description="a folder, several (training dialogs are about COCO's train2014 and "
        "val2014), or some for each split; the image of id 9 is any file whose name ends with "
        "that number"
    )
    dialogs: str | dict[str, str] = Field(description="one file, or a file for each split")
    dense: str | dict[str, str] | None = Field(
        default=None,
        description="the dense annotations of one file of dialogs, or of some of the splits",
    )
    validation_fraction: float | None = validation_share("of a single file")

    @model_validator(mode="after")
    def _splits_agree(self) -> Self:
        beside = {"images": self.images}
        check_splits("dialogs", self.dialogs, self.validation_fraction, beside)
        splits = set(self.dialogs) if isinstance(self.dialogs, dict) else set()
        if isinstance(self.dense, dict) and not set(self.dense) <= splits:
            raise ValueError(
                f"dense has the splits {sorted(self.dense)}, dialogs has {sorted(splits)}"
            )
        if isinstance(self.dense, str) and splits:
            raise ValueError("dialogs has a file for each split, so dense needs them by split too")
        return self

    def build(self) -> "VisdialSource":
        return VisdialSource(self)

    def locations(self) -> dict[str, str]:
        return by_key(images=self.images, dialogs=self.dialogs, dense=self.dense)


class VisdialSource:
    """Images and dialogs of one or more VisDial files."""

    def __init__(self, config: VisdialSourceConfig) -> None:
        self.config = config
        self._num_entries: dict[str, int] = {}

    def index(self) -> Mapping[str, int]:
        """Returns how many dialogs each file has."""
        return self._num_entries

    def records(self) -> Iterator[Record | Reject]:
        """Lists the images of every file in its order."""
        dialogs, dense = self.config.dialogs, self.config.dense
        files = {"": dialogs} if isinstance(dialogs, str) else dialogs
        self._num_entries = {}
        for split, location in files.items():
            judged = dense.get(split) if isinstance(dense, dict) else dense
            yield from self._file(location, judged, split)

    def read(self, record: Record) -> bytes:
        """Returns the image file's bytes; `record.image` is its location."""
        return read_image(record)

    def _file(self, location: str, dense: str | None, split: str) -> Iterator[Record | Reject]:
        folders = ImageFolders(*folders_of(self.config.images, split))
        document = read_json(storage.absolute(location), _DIALOGS)
        words = _Words(
            document.list("data", "questions").strings(), document.list("data", "answers").strings()
        )
        listed_dialogs = document.list("data", "dialogs")
        self._num_entries[f"{split} {location}".lstrip()] = len(listed_dialogs)
        dialogs = Groups(listed_dialogs, "image_id")
        judgements, judged = None, None
        if dense is not None:
            judgements = read_json_list(storage.absolute(dense), _DENSE)
            judged = Groups(judgements, "image_id")
        for image_id, entries in dialogs:
            found = [*listed_dialogs.checked(words.dialog, entries)]
            if judged is not None and found:
                for dialog in judged.made(partial(_with_relevance, found), image_id):
                    found[0] = dialog
            texts = Texts(image_id, dialogs=tuple(found))
            key = image_key(image_id)
            yield listed(
                key=key,
                split=split or hash_split(key, self.config.validation_fraction),
                image=folders.numbered(image_id),
                texts=texts,
                fault=None if texts.num_rounds else (Reason.NO_ROUNDS, "its dialogs have no round"),
                num_entries=len(found),
            )
        yield from listed_dialogs.rejects(split)
        if judgements is None or judged is None:
            return
        for image_id, _ in judged:
            if not dialogs.of(image_id):
                yield self._orphan(image_id, f"{dense} judges a dialog that is not there", split)
        for reject in judgements.rejects(split):
            yield msgspec.structs.replace(reject, num_entries=0)

    def _orphan(self, image_id: Identity, detail: str, split: str) -> Reject:
        key = image_key(image_id)
        reject = without_texts(
            Texts(image_id),
            key=key,
            split=split or hash_split(key, self.config.validation_fraction),
            reason=Reason.UNKNOWN_IMAGE,
            detail=f"image {image_id!r}: {detail}",
            image=detail,
        )
        return msgspec.structs.replace(reject, num_entries=0)


class _Words:
    """The questions and answers that a file's dialogs speak of by number."""

    def __init__(self, questions: Sequence[str | None], answers: Sequence[str | None]) -> None:
        self._questions = questions
        self._answers = answers

    def dialog(self, entry: Fields) -> Dialog:
        return Dialog(
            caption=entry.string("caption").strip(),
            rounds=tuple(self._round(turn) for turn in entry.objects("dialog") if turn.values),
        )

    def _round(self, turn: Fields) -> Round:
        options = turn.list("answer_options") if "answer_options" in turn else []
        answer = gt_index = None
        if "answer" in turn:
            answer = turn.integer("answer", len(self._answers))
        for option in options:
            if type(option) is not int or not 0 <= option < len(self._answers):
                raise turn.wrong(
                    "answer_options",
                    f"expected numbers from 0 to {len(self._answers) - 1}, found {shown(option)}",
                )
        if "gt_index" in turn:
            gt_index = turn.integer("gt_index", len(options))
            if answer is not None and options[gt_index] != answer:
                raise turn.wrong(
                    "gt_index", f"option {gt_index} is answer {options[gt_index]}, not {answer}"
                )
        question = turn.integer("question", len(self._questions))
        return Round(
            question=_said(self._questions, question, turn, "question"),
            answer="" if answer is None else _said(self._answers, answer, turn, "answer"),
            options=tuple(
                _said(self._answers, option, turn, "answer_options") for option in options
            ),
            gt_index=-1 if gt_index is None else gt_index,
        )


def _said(words: Sequence[str | None], number: int, turn: Fields, name: str) -> str:
    found = words[number]
    if found is None:
        raise turn.wrong(name, f"number {number} of the list that it is in is no string")
    return found


def _with_relevance(dialogs: Sequence[Dialog], entry: Fields) -> Dialog:
    """Returns the first dialog of an image with what a dense annotation says of it."""
    rounds = list(dialogs[0].rounds)
    index = entry.integer("round_id", len(rounds) + 1) - 1
    if index < 0:
        raise entry.wrong("round_id", "rounds count from 1, found 0")
    name = next((name for name in _RELEVANCE if name in entry), _RELEVANCE[0])
    relevance = entry.list(name)
    num_options = len(rounds[index].options)
    if len(relevance) != num_options or not all(
        type(value) in (int, float) and 0 <= value <= 1 for value in relevance
    ):
        raise entry.wrong(
            name,
            f"expected {num_options} numbers from 0 to 1, one for each option of round "
            f"{index + 1}, found {len(relevance)} values",
        )
    rounds[index] = replace(rounds[index], relevance=tuple(map(float, relevance)))
    return replace(dialogs[0], rounds=tuple(rounds))
