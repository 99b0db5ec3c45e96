import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.sample import Question
from pipeline.data.text.vocabulary import (
    SPECIAL_PIECES,
    answer_vocabulary,
    build_tokenizer,
    load_tokenizer,
)
from pipeline.errors import ConfigError

CAPTIONS = [
    "A man riding a wave on top of a surfboard.",
    "A surfer rides a big wave, and the man smiles!",
    "Two dogs running; one dog is catching a café's red frisbee.",
    "The waves are big today",
]


def pieces_of(tokenizer: object) -> list[str]:
    vocabulary = tokenizer.get_vocab()  # type: ignore[attr-defined]
    return sorted(vocabulary, key=vocabulary.__getitem__)


@pytest.mark.processes
def test_the_same_captions_give_the_same_ids_in_any_order_and_any_process() -> None:
    here = pieces_of(build_tokenizer(iter(CAPTIONS), 120))
    assert pieces_of(build_tokenizer(reversed(CAPTIONS), 120)) == here
    program = (
        "import sys, json; from pipeline.data.text.vocabulary import build_tokenizer;"
        "vocabulary = build_tokenizer(json.load(sys.stdin), 120).get_vocab();"
        "print(json.dumps(sorted(vocabulary, key=vocabulary.get)))"
    )
    for _ in range(2):
        there = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(CAPTIONS),
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).resolve().parents[3],
        )
        assert json.loads(there.stdout) == here


def test_special_pieces_come_first_and_the_size_is_kept() -> None:
    tokenizer = build_tokenizer(CAPTIONS, 90)
    assert tuple(pieces_of(tokenizer)[:5]) == SPECIAL_PIECES
    assert len(tokenizer) == 90
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 4)


def test_every_word_of_the_captions_is_lower_cased_and_has_pieces() -> None:
    tokenizer = build_tokenizer(CAPTIONS, 300)
    assert tokenizer.tokenize("A MAN riding a wave, Café!") == [
        *("a", "man", "riding", "a", "wave", ",", "cafe", "!")
    ]
    for caption in CAPTIONS:
        assert "[UNK]" not in tokenizer.tokenize(caption)
    assert tokenizer.tokenize("ζ") == ["[UNK]"]


def test_a_pair_is_framed_as_bert_frames_it() -> None:
    tokenizer = build_tokenizer(CAPTIONS, 300)
    ids = tokenizer("a man")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "a", "man", "[SEP]"]


def test_a_size_below_the_letters_is_refused_with_the_least_that_would_do() -> None:
    with pytest.raises(ConfigError, match=r"vocab_size=10 .* give at least (\d+)") as refused:
        build_tokenizer(CAPTIONS, 10)
    least = int(str(refused.value).rsplit(" ", 1)[-1])
    assert len(build_tokenizer(CAPTIONS, least)) == least


def test_captions_without_a_word_are_refused() -> None:
    with pytest.raises(ConfigError, match="no word"):
        build_tokenizer(["", " "], 100)


def test_a_saved_tokenizer_loads_with_the_same_ids(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(CAPTIONS, 120)
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert pieces_of(loaded) == pieces_of(tokenizer)
    assert loaded("Two dogs, a wave")["input_ids"] == tokenizer("Two dogs, a wave")["input_ids"]


def test_a_vocabulary_file_and_a_folder_that_holds_one_load_alike(tmp_path: Path) -> None:
    pieces = [*SPECIAL_PIECES, "a", "wave", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    for location in (tmp_path, tmp_path / "vocab.txt", str(tmp_path)):
        tokenizer = load_tokenizer(location)
        assert pieces_of(tokenizer) == pieces
        assert tokenizer("A waves")["input_ids"] == [2, 5, 6, 7, 3]


def test_published_bert_pieces_are_read_unchanged(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "bert-base-uncased" / "vocab.txt")
    assert len(tokenizer) == 30_522
    ids = tokenizer("a man riding a wave")["input_ids"]
    assert ids == [101, 1037, 2158, 5559, 1037, 4400, 102]
    assert tokenizer.tokenize("surfboarding") == ["surf", "##boarding"]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id) == (
        0,
        100,
        103,
    )


@pytest.mark.parametrize("content", [None, "", "hello\nworld\n"])
def test_what_is_not_a_tokenizer_is_refused_by_name(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "vocab.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"vocab\.txt"):
        load_tokenizer(path)


def ask(*answers: str) -> Question:
    return Question(question_id=1, question="what?", answers=answers)


def test_answers_are_ordered_by_count_then_text_whatever_the_order_of_questions() -> None:
    questions = [
        ask("red", "red", "dark red"),
        ask("blue"),
        ask("two", "2"),
        ask("blue", "navy", "blue"),
        ask("red"),
        ask("green"),
        ask(),
    ]
    expected = ["blue", "red", "2", "green"]
    assert answer_vocabulary(questions, 10, 1) == expected
    assert answer_vocabulary(reversed(questions), 10, 1) == expected
    assert answer_vocabulary(questions, 3, 1) == expected[:3]
    assert answer_vocabulary(questions, 10, 2) == ["blue", "red"]


def test_a_tokenizer_of_a_language_model_answers_to_the_names_of_berts_tokens(
    shared_data: Path, tmp_path: Path
) -> None:
    from transformers import GPT2TokenizerFast

    folder = shared_data / "tokenizers" / "gpt2"
    theirs: Any = GPT2TokenizerFast(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")
    )
    theirs.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    end = tokenizer.eos_token_id
    assert tokenizer("hello world").input_ids == [31373, 995]
    names = ("cls", "sep", "pad", "mask")
    assert [getattr(tokenizer, f"{name}_token_id") for name in names] == [end] * 4
    assert tokenizer.decode([end, 31373, 995, end], skip_special_tokens=True) == "hello world"
    assert len(tokenizer) == 50257


@pytest.mark.parametrize(
    ("name", "payload", "said"),
    [
        ("tokenizer.json", b"{", "tokenizer.json: damaged: not JSON"),
        ("tokenizer.json", b"[" * 100_000, "tokenizer.json: damaged: not JSON"),
        ("tokenizer.json", b"3", "tokenizer.json: expected an object, found int"),
        ("tokenizer.json", b"{}", "cannot read it"),
        ("tokenizer.json", None, "no words but 5 special tokens; tokenizer.json"),
        ("tokenizer_config.json", b"\xff", "tokenizer_config.json: damaged: not JSON"),
        ("tokenizer_config.json", b'{"tokenizer_class": 3}', "tokenizer: "),
    ],
)
def test_a_damaged_tokenizer_is_named_by_its_file(
    name: str, payload: bytes | None, said: str, tmp_path: Path
) -> None:
    build_tokenizer(["a red circle and a blue square"] * 3, 60).save_pretrained(str(tmp_path))
    (tmp_path / name).unlink() if payload is None else (tmp_path / name).write_bytes(payload)
    with pytest.raises(ConfigError, match=said):
        load_tokenizer(str(tmp_path))


def test_a_vocabulary_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(b"[PAD]\n\xff\xfe\n")
    with pytest.raises(ConfigError, match=r"vocab\.txt: not UTF-8"):
        load_tokenizer(str(tmp_path))
