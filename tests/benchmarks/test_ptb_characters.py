"""What a character is read as: the lists of the official tokenizer, not those of Unicode."""

import pytest

from pipeline.benchmarks.ptb_characters import DIGIT, HYPHEN, LEFT_OUT, LETTER, MARK, shape


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("a plain caption.", "a plain caption."),
        ("é中", LETTER * 2),
        ("e\u0301\u093f\u05b8\u064e", "e" + MARK * 4),
        ("٣१", DIGIT * 2),
        ("\u2010\u2011", HYPHEN * 2),
        ("\u200b\ufe0f\U0001f642\x01", LEFT_OUT * 4),
        ("“”’–½€★\u00a0", "“”’–½€★\u00a0"),
    ],
)
def test_what_is_read_alike_is_the_same_character(text: str, read: str) -> None:
    assert shape(text) == read
    assert len(read) == len(text)
