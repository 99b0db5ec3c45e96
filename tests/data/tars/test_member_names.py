import random

import pytest

from pipeline.data.tars.member_names import is_hidden, natural_order, shown


def test_numbers_in_names_are_sorted_as_people_count() -> None:
    names = [f"clip/{number}.jpg" for number in range(1, 121)]
    shuffled = random.Random(0).sample(names, len(names))
    assert sorted(shuffled, key=natural_order) == names
    padded = [f"{number:05d}.jpg" for number in range(120)]
    assert sorted(padded, key=natural_order) == sorted(padded)


def test_every_two_names_have_an_order() -> None:
    names = ["", "1", "01", "a", "a1", "1a", "a1b2", "a01b2", "9" * 5000, "8" * 5001, "²", "٣"]
    for seed in range(20):
        shuffled = random.Random(seed).sample(names, len(names))
        assert sorted(shuffled, key=natural_order) == sorted(names, key=natural_order)
    assert sorted(["8" * 5001, "9" * 5000], key=natural_order) == ["9" * 5000, "8" * 5001]


@pytest.mark.parametrize(
    "name",
    [
        *("._a.jpg", "x/.DS_Store", "__MACOSX/a.jpg", "x/__MACOSX/a.jpg"),
        *("Thumbs.db", "x/ehthumbs.db", "x/Desktop.ini", "Icon\r"),
    ],
)
def test_what_systems_put_beside_files_is_hidden(name: str) -> None:
    assert is_hidden(name)


@pytest.mark.parametrize(
    "name", ["a.jpg", "./a.jpg", "../a.jpg", ".x/a.jpg", "__MACOSX", "", "Icon"]
)
def test_other_files_are_not(name: str) -> None:
    assert not is_hidden(name)


def test_a_name_is_shown_whatever_its_bytes_are() -> None:
    assert shown("caf\udce9.jpg") == r"caf\xe9.jpg"
    assert shown("a\nb é") == r"a\nb é"
    for name in ("\ud800", "\udfff", "\0\x1b[31m", "\u202e"):
        shown(name).encode()
