"""The sample: what a source record becomes on its way into a shard.

A sample is a key with named parts; its `json` part is the canonical form of `Texts`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import msgspec
import xxhash

from pipeline.errors import ShardError

TextKind = Literal["captions", "questions", "rounds"]

MAX_KEY_LENGTH = 80  # leaves 19 characters for ".boxes.npy" and the like in USTAR's 100
_SAFE_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_KEY_LENGTH}}}")
_DIGEST_LENGTH = 16


@dataclass(frozen=True)
class Sample:
    """One example: a key and its parts, suffix to payload, such as `jpg` and `json`."""

    key: str
    parts: Mapping[str, bytes]


@dataclass(frozen=True)
class Question:
    """A question with every human answer kept (VQA v2 has ten)."""

    question_id: int | str
    question: str
    answers: tuple[str, ...]
    question_type: str = ""
    answer_type: str = ""


@dataclass(frozen=True)
class Round:
    """One turn of a dialog. `options[gt_index]` is the answer where options are given.

    `relevance` has a number from 0 to 1 for each option where people were asked (VisDial's dense
    annotations, of one round of a dialog).
    """

    question: str
    answer: str
    options: tuple[str, ...] = ()
    gt_index: int = -1
    relevance: tuple[float, ...] = ()


@dataclass(frozen=True)
class Dialog:
    """A caption, then rounds in which later questions may refer back."""

    caption: str
    rounds: tuple[Round, ...]


@dataclass(frozen=True)
class Texts:
    """Everything people wrote about one image."""

    image_id: int | str
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    dialogs: tuple[Dialog, ...] = ()

    def encoded(self) -> "EncodedTexts":
        """Returns them as they travel and are stored."""
        return EncodedTexts(
            self.to_json(), len(self.captions), len(self.questions), self.num_rounds
        )

    @property
    def num_rounds(self) -> int:
        """The rounds of all dialogs together."""
        return sum(len(dialog.rounds) for dialog in self.dialogs)

    @property
    def num_texts(self) -> int:
        """The captions, questions and rounds together."""
        return len(self.captions) + len(self.questions) + self.num_rounds

    def to_json(self) -> bytes:
        """Returns UTF-8 JSON with sorted keys and no spaces: equal texts, equal bytes."""
        try:
            return _ENCODER.encode(self)
        except UnicodeEncodeError as error:
            raise ShardError(
                f"texts of image {self.image_id!r}: half a surrogate pair in "
                f"{error.object[:60]!r}; text must be encodable as UTF-8"
            ) from error

    @classmethod
    def from_json(cls, payload: bytes, kind: TextKind | None = None) -> "Texts":
        """Reads what `to_json` wrote; absent lists are empty and unknown keys are ignored.

        With `kind` the lists of other kinds stay empty: they are passed over at a fraction of
        what it takes to make objects of them, of ten answers or a hundred options each. Raises
        ShardError if the payload is not JSON or a value that is read has the wrong type.
        """
        try:
            return _DECODERS[kind].decode(payload)
        except msgspec.ValidationError as error:
            raise ShardError(
                f"texts have another shape than Sightline writes ({error}): {payload[:60]!r}"
            ) from error
        except ValueError as error:
            raise ShardError(f"texts are not JSON ({error}): {payload[:60]!r}") from error


class EncodedTexts(msgspec.Struct, frozen=True):
    """Texts as they lie in a shard, and how many there are of each kind."""

    payload: bytes  # as `Texts.to_json` returns it
    num_captions: int
    num_questions: int
    num_rounds: int

    @property
    def num_texts(self) -> int:
        """The captions, questions and rounds together."""
        return self.num_captions + self.num_questions + self.num_rounds

    def fingerprint(self) -> str:
        """Returns what differs if the texts do."""
        return xxhash.xxh3_64_hexdigest(self.payload)

    def decode(self) -> Texts:
        """Returns the texts themselves."""
        return Texts.from_json(self.payload)


@dataclass(frozen=True)
class _Captions(Texts):
    questions: ClassVar[tuple[Question, ...]] = ()  # type: ignore[misc]  # no field, so not read
    dialogs: ClassVar[tuple[Dialog, ...]] = ()  # type: ignore[misc]


@dataclass(frozen=True)
class _Questions(Texts):
    captions: ClassVar[tuple[str, ...]] = ()  # type: ignore[misc]
    dialogs: ClassVar[tuple[Dialog, ...]] = ()  # type: ignore[misc]


@dataclass(frozen=True)
class _Rounds(Texts):
    captions: ClassVar[tuple[str, ...]] = ()  # type: ignore[misc]
    questions: ClassVar[tuple[Question, ...]] = ()  # type: ignore[misc]


# These check every type, and cost an eighth of the standard library's JSON without.
_ENCODER = msgspec.json.Encoder(order="sorted")
_DECODERS: dict[TextKind | None, msgspec.json.Decoder[Texts]] = {
    None: msgspec.json.Decoder(Texts),
    "captions": msgspec.json.Decoder(_Captions),
    "questions": msgspec.json.Decoder(_Questions),
    "rounds": msgspec.json.Decoder(_Rounds),
}


def safe_key(text: str) -> str:
    """Returns a key for any identifier: itself if it can be one, else a readable form of it.

    Keys hold only ASCII letters, digits, `_` and `-`: readers end a key at its first dot, `/`
    makes folders, and a tar has no agreed encoding for more. Anything else, or a name over
    `MAX_KEY_LENGTH`, is transcribed with a digest of the whole text behind it, so that
    different texts keep different keys and the same text always has the same one.
    """
    if _SAFE_KEY.fullmatch(text):
        return text
    digest = xxhash.xxh3_64_hexdigest(text.encode("utf-8", "surrogatepass"))
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")
    readable = readable[: MAX_KEY_LENGTH - _DIGEST_LENGTH - 1]
    return f"{readable}-{digest}" if readable else digest


def check_key(key: str) -> None:
    """Raises ShardError unless the key could have come from `safe_key`."""
    if not _SAFE_KEY.fullmatch(key):
        raise ShardError(
            f"key {key!r}: expected 1 to {MAX_KEY_LENGTH} ASCII letters, digits, '_' or '-'; "
            f"safe_key makes {safe_key(key)!r} of it"
        )
