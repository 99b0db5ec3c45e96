"""The tokenizer against what Stanford's made of real captions and of difficult ones."""

import time

import pytest

from pipeline.benchmarks.ptb_tokenizer import tokenize
from tests.benchmarks.excerpts import read_excerpt


def test_every_token_equals_the_official_tokenizer() -> None:
    captions = read_excerpt("ptb-tokens")
    assert len(captions) == 2001
    for caption, tokens in captions:
        assert tokenize(caption) == tokens


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man isn't riding, is he?", "a man is n't riding is he"),
        ("The dog's ball -- it can't be the cats'!", "the dog 's ball it ca n't be the cats"),
        ("He cannot; they're gonna", "he can not they 're gon na"),
        ("a (red) [sic] {x}", "a -lrb- red -rrb- -lsb- sic -rsb- -lcb- x -rcb-"),
        ("“quoted” ‘words’ it’s", "quoted words it 's"),
        ("a two-story house and/or a t-shirt", "a two-story house and/or a t-shirt"),
        ("$5.00 is 5% of 1,000 at 12:30pm", "$ 5.00 is 5 % of 1,000 at 12:30 pm"),
        ("2 1/2 cups, ½ cup", "2\u00a01/2 cups 1/2 cup"),
        ("Mr. Smith of St. Ives, U.S. at 5 a.m.", "mr. smith of st. ives u.s. at 5 a.m."),
        ("made of K. The rest", "made of k the rest"),
        ("by J. Smith", "by j. smith"),
        ("no. 5 and no.", "no. 5 and no"),
        ("rock 'n' roll in the '90s", "rock 'n' roll in the '90s"),
        ("O'Neil at 6 o'clock", "o'neil at 6 o'clock"),
        ("what?! yes!!", "what ?! yes !!"),
        ("AT&T and b&w", "at&t and b & w"),
        ("a   b\tc\nd", "a b c d"),
        ("a 🙂 dog ★", "a dog ★"),
        ("...", ""),
        ("", ""),
    ],
)
def test_difficult_captions_become_what_the_official_tokenizer_made(
    caption: str, tokens: str
) -> None:
    assert tokenize(caption) == tokens


@pytest.mark.parametrize(
    "unit", ["a", "1", ".", "'", "-", "a.", "1,", "a-", "(5", "@a.", "a'a", "/"]
)
def test_a_long_run_of_anything_takes_no_time_to_speak_of(unit: str) -> None:
    started = time.process_time()
    tokenize(unit * (2000 // len(unit)))
    assert time.process_time() - started < 2
