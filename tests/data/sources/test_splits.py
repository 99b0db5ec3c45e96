import pytest

from pipeline.data.sources.splits import check_names, check_splits, folders_of, hash_split


def test_a_split_by_hash_is_a_tenth_by_default() -> None:
    keys = [f"key-{number}" for number in range(2000)]
    assert 150 < sum(hash_split(key, None) == "validation" for key in keys) < 250
    assert {hash_split(key, 0.0) for key in keys} == {"train"}


def test_folders_are_those_of_the_split_or_of_all() -> None:
    assert folders_of("a", "train") == ["a"]
    assert folders_of(["a", "b"], "train") == ["a", "b"]
    by_split: dict[str, str | list[str]] = {"train": ["a", "b"], "test": "c"}
    assert folders_of(by_split, "test") == ["c"]


@pytest.mark.parametrize(
    ("files", "fraction", "images", "match"),
    [
        ({"train": "a"}, 0.2, "i", "leave one of them out"),
        ("a", None, {"train": "i"}, "files is one file"),
        ({"train": "a"}, None, {"test": "i"}, "must be the same"),
        ({"a/b": "a"}, None, "i", "only ASCII"),
        ({}, None, "i", "names no file"),
    ],
)
def test_settings_that_disagree_about_splits_are_refused(
    files: object, fraction: float | None, images: object, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        check_splits("files", files, fraction, {"images": images})


def test_settings_that_agree_pass() -> None:
    check_splits("files", "a", 0.3, {"images": "i"})
    check_splits("files", {"a": "x", "b": "y"}, None, {"images": {"b": "i", "a": "i"}})
    check_names("train", "val_2")
