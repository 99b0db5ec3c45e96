import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.sample import (
    MAX_KEY_LENGTH,
    Dialog,
    Question,
    Round,
    Texts,
    check_key,
    safe_key,
)
from pipeline.errors import ShardError

TEXTS = Texts(
    image_id=42,
    captions=("a cat", "eine Katze – 猫"),
    questions=(Question(7, "what?", ("cat", "cat", "dog"), "what", "other"),),
    dialogs=(
        Dialog(
            "a cat",
            (Round("is it?", "yes", ("no", "yes"), 1, (0.25, 1.0)), Round("why?", "because")),
        ),
    ),
)


def test_texts_survive_json() -> None:
    assert Texts.from_json(TEXTS.to_json()) == TEXTS
    assert (TEXTS.num_rounds, TEXTS.num_texts) == (2, 5)


def test_one_kind_of_texts_can_be_read_alone() -> None:
    payload = TEXTS.to_json()
    for kind, name in (("captions", "captions"), ("questions", "questions"), ("rounds", "dialogs")):
        found = Texts.from_json(payload, kind)  # type: ignore[arg-type]
        assert isinstance(found, Texts)
        assert found.image_id == TEXTS.image_id
        for each in ("captions", "questions", "dialogs"):
            assert getattr(found, each) == (getattr(TEXTS, each) if each == name else ())
    assert Texts.from_json(payload, "rounds").num_rounds == TEXTS.num_rounds
    with pytest.raises(ShardError, match="not JSON"):
        Texts.from_json(payload[:-2], "captions")


def test_texts_have_one_canonical_form() -> None:
    payload = TEXTS.to_json()
    assert payload == Texts.from_json(payload).to_json()
    assert list(json.loads(payload)) == sorted(json.loads(payload))
    assert "猫".encode() in payload


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers() | st.text("aé/\\"))
def test_the_canonical_form_is_that_of_the_standard_library(text: str, image_id: int | str) -> None:
    texts = Texts(image_id, (text,), (Question(image_id, text, (text,)),))
    expected = json.dumps(
        dataclasses.asdict(texts), sort_keys=True, ensure_ascii=False, separators=(",", ":")
    )
    assert texts.to_json() == expected.encode()
    assert Texts.from_json(texts.to_json()) == texts


def test_absent_lists_are_empty_and_unknown_keys_ignored() -> None:
    assert Texts.from_json(b'{"image_id": "x", "colour": 1}') == Texts("x")


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"\xff",
        b"{}",
        b'{"image_id": true}',
        b'{"image_id": 1, "captions": "one"}',
        b'{"image_id": 1, "captions": [1]}',
        b'{"image_id": 1, "questions": [{"question": "q"}]}',
        b'{"image_id": 1, "dialogs": [3]}',
        b'{"image_id": 1, "captions": ["\xff"]}',
        b'{"image_id": 1.5}',
        b'{"image_id": 1} x',
    ],
)
def test_malformed_texts_are_refused(payload: bytes) -> None:
    with pytest.raises(ShardError, match="texts"):
        Texts.from_json(payload)


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(ShardError, match="surrogate"):
        Texts(1, captions=("\ud800",)).to_json()


@pytest.mark.parametrize("text", ["000000000042", "A_b-9", "x" * MAX_KEY_LENGTH])
def test_a_fit_identifier_is_its_own_key(text: str) -> None:
    assert safe_key(text) == text


def test_any_identifiers_have_different_fit_keys() -> None:
    texts = ["", ".", "/", "a.b", "a/b", "a b", "a-b", "größe", "grösse", "猫", "x" * 81, "x" * 82]
    keys = [safe_key(text) for text in [*texts, "\ud800"]]
    assert len(set(keys)) == len(keys)
    for key in keys:
        check_key(key)
    assert safe_key("größe") == safe_key("größe")


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "ä", "x" * 81, "a\n"])
def test_unfit_keys_are_refused_with_a_fit_one(key: str) -> None:
    with pytest.raises(ShardError, match=r"safe_key makes '[\w-]+'"):
        check_key(key)
