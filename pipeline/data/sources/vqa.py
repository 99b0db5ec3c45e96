"""The VQA v2 format: questions about numbered images, and ten people's answers to each.

Files as published, packed with gzip or not, and others of that shape. What becomes of each image
that questions are asked about:

- its file is there and a question is left: a sample. A question that `annotations` does not
  answer is dropped and counted in the sample's `detail`; all of them: a `no-answers` reject.
- its file is not there: `missing-image`; its name is not an image's: `unknown-suffix`.
- an annotation of a question that is not asked: one `unknown-question` reject per image.
- a question or an annotation that is not what the format says, a second question of an id, or a
  second annotation of a question: a `malformed-record`, which costs itself.

Annotations without `question_type` and `answer_type`, by which accuracy is reported, are refused.
Without `annotations`, as for the test questions, every question is kept with no answers.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, Self

from msgspec.structs import replace
from pydantic import Field, model_validator

from pipeline import storage
from pipeline.data.sample import Question, Texts, safe_key
from pipeline.data.sources.base import (
    Record,
    Reject,
    SourceConfig,
    by_key,
    without_texts,
)
from pipeline.data.sources.image_files import ImageFolders, image_key, listed, read_image
from pipeline.data.sources.readers.json_file import Fields, Groups, Identity, JsonList, read_json
from pipeline.data.sources.splits import check_splits, folders_of, hash_split, validation_share
from pipeline.errors import SourceError
from pipeline.reason import Reason

_QUESTIONS = "a VQA v2 questions file"
_ANNOTATIONS = "a VQA v2 annotations file"
_ANNOTATION_FIELDS = ("question_id", "image_id", "question_type", "answer_type", "answers")
_NUM_CHECKED = 10  # annotations that say whether the file is one


class VqaSourceConfig(SourceConfig):
    """Where the files are, and how the images of a single file are split."""

    type: Literal["vqa"] = Field(description="VQA v2's questions and annotations")
    images: str | list[str] | dict[str, str | list[str]] = Field(
        description="a folder, several, or some for each split; the image of id 9 is any file "
        "whose name ends with that number: COCO_train2014_000000000009.jpg, 000000000009.jpg, "
        "image9.png"
    )
    questions: str | dict[str, str] = Field(description="one file, or a file for each split")
    annotations: str | dict[str, str] | None = Field(
        default=None,
        description="one file, or a file for each split; null: the questions have no answers",
    )
    validation_fraction: float | None = validation_share("of a single file")

    @model_validator(mode="after")
    def _splits_agree(self) -> Self:
        beside = {"images": self.images}
        check_splits("questions", self.questions, self.validation_fraction, beside)
        if self.annotations is None:
            return self
        if isinstance(self.questions, str):
            check_splits("questions", self.questions, None, {"annotations": self.annotations})
        elif isinstance(self.annotations, str):
            raise ValueError("questions has a file for each split, so annotations needs them too")
        elif not set(self.annotations) <= set(self.questions):
            raise ValueError(
                f"annotations has the splits {sorted(self.annotations)}, questions has only "
                f"{sorted(self.questions)}"
            )
        return self

    def build(self) -> "VqaSource":
        return VqaSource(self)

    def locations(self) -> dict[str, str]:
        return by_key(images=self.images, questions=self.questions, annotations=self.annotations)


class VqaSource:
    """Images, questions and answers of one or more VQA files. Every answer is kept."""

    def __init__(self, config: VqaSourceConfig) -> None:
        self.config = config
        self._num_entries: dict[str, int] = {}

    def index(self) -> Mapping[str, int]:
        """Returns how many questions each file asks."""
        return self._num_entries

    def records(self) -> Iterator[Record | Reject]:
        """Lists the images of every file in the order they are first asked about."""
        questions, annotations = self.config.questions, self.config.annotations
        files = {"": questions} if isinstance(questions, str) else questions
        self._num_entries = {}
        for split, location in files.items():
            answers = annotations.get(split) if isinstance(annotations, dict) else annotations
            yield from self._file(location, answers, split)

    def read(self, record: Record) -> bytes:
        """Returns the image file's bytes; `record.image` is its location."""
        return read_image(record)

    def _file(self, location: str, answers: str | None, split: str) -> Iterator[Record | Reject]:
        folders = ImageFolders(*folders_of(self.config.images, split))
        document = read_json(storage.absolute(location), _QUESTIONS)
        asked = document.list("questions")
        self._num_entries[f"{split} {location}".lstrip()] = len(asked)
        questions = Groups(asked, "image_id")
        answered, num_used = None, 0
        if answers is not None:
            document = read_json(storage.absolute(answers), _ANNOTATIONS)
            annotations = document.list("annotations")
            _check_fields(annotations)
            answered = Groups(annotations, "question_id")
        for image_id, entries in questions:
            key = image_key(image_id)
            entries = [*asked.checked(_once(), entries)]
            found = [*asked.checked(lambda entry: _question(entry, answered), entries)]
            kept = tuple(question for question in found if question is not None)
            num_used += len(kept)
            num_dropped = len(found) - len(kept)
            detail = f"{num_dropped} questions without answers dropped" if num_dropped else ""
            fault = (
                Reason.NO_ANSWERS,
                f"image {image_id!r}: {answers} answers no question about it",
            )
            yield listed(
                key=key,
                split=split or hash_split(key, self.config.validation_fraction),
                image=folders.numbered(image_id),
                texts=Texts(image_id, questions=kept),
                detail=detail,
                fault=None if kept else fault,
                num_entries=len(found),
            )
        yield from asked.rejects(split)
        if answered is not None:
            if num_used < len(annotations):
                by_image = Groups(annotations, "image_id")
                yield from self._orphans(questions, by_image, location, split)
            yield from (replace(reject, num_entries=0) for reject in annotations.rejects(split))

    def _orphans(
        self, questions: Groups, answered: Groups, location: str, split: str
    ) -> Iterator[Reject]:
        """Yields a reject for each image with answers to questions that are not asked."""
        for image_id, entries in answered:
            asked = {_id_of(entry) for entry in questions.of(image_id)}
            unknown = [_id_of(entry) for entry in entries]
            unknown = [found for found in unknown if found is not None and found not in asked]
            if unknown:
                key = safe_key(f"{image_key(image_id)}-unknown-questions")
                reject = without_texts(
                    Texts(image_id),
                    key=key,
                    split=split or hash_split(image_key(image_id), self.config.validation_fraction),
                    reason=Reason.UNKNOWN_QUESTION,
                    detail=f"{len(unknown)} annotations of image {image_id!r} answer questions "
                    f"that {location} does not ask of it, such as {unknown[0]!r}",
                    image=repr(unknown),
                )
                yield replace(reject, num_entries=0)


def _check_fields(annotations: JsonList) -> None:
    """Raises SourceError if the first annotations all lack fields: it is another kind of file."""
    first = range(min(len(annotations), _NUM_CHECKED))
    entries = [*annotations.made(annotations.object, first)]
    if not any(all(name in entry for name in _ANNOTATION_FIELDS) for entry in entries):
        for entry in entries:
            entry.require(*_ANNOTATION_FIELDS)


def _id_of(entry: Fields) -> Identity | None:
    """Returns an entry's question id, or None of one that is refused for the want of it."""
    try:
        return entry.identity("question_id")
    except SourceError:
        return None


def _once() -> Callable[[Fields], Fields]:
    """Returns what takes an image's questions, and raises SourceError of an id that comes again."""
    known: set[Identity] = set()

    def first(entry: Fields) -> Fields:
        question_id = entry.identity("question_id")
        if question_id in known:
            raise entry.wrong("question_id", f"question {question_id!r} is asked twice")
        known.add(question_id)
        return entry

    return first


def _question(entry: Fields, answered: Groups | None) -> Question | None:
    """Returns a question with its answers, or None if there is no annotation of it."""
    question_id, words = entry.identity("question_id"), entry.string("question").strip()
    if answered is None:
        return Question(question_id, words, ())
    image_id = entry.identity("image_id")

    def answer(annotation: Fields) -> Question | None:
        if annotation.identity("image_id") != image_id:
            return None
        if found:
            raise annotation.wrong("question_id", f"question {question_id!r} is answered twice")
        return Question(
            question_id=question_id,
            question=words,
            answers=tuple(given.string("answer") for given in annotation.objects("answers")),
            question_type=annotation.string("question_type"),
            answer_type=annotation.string("answer_type"),
        )

    found: list[Question] = []
    for question in answered.made(answer, question_id):
        if question is not None:
            found.append(question)
    return found[0] if found else None
