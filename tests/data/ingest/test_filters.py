import pytest

from pipeline.config import check
from pipeline.data.ingest.filters import FilterConfig
from pipeline.data.media.image_check import BadImageError
from pipeline.data.sample import Question, Texts
from pipeline.data.sources.base import Record, Reject, fingerprint
from pipeline.errors import ConfigError


def record(*captions: str, questions: tuple[Question, ...] = ()) -> Record:
    texts = Texts("a", captions, questions)
    return Record("a", "train", "a.jpg", "jpg", texts.encoded(), fingerprint("a"))


@pytest.mark.parametrize(
    ("settings", "size", "reason"),
    [
        ({"min_shorter_side": 64}, (64, 64), ""),
        ({"min_shorter_side": 64}, (63, 900), "too-small"),
        ({"max_aspect_ratio": 2.0}, (128, 64), ""),
        ({"max_aspect_ratio": 2.0}, (64, 129), "extreme-aspect"),
        ({}, (1, 900), ""),
    ],
)
def test_sizes_are_judged_whichever_way_up(
    settings: dict[str, float], size: tuple[int, int], reason: str
) -> None:
    config = FilterConfig.model_validate(settings)
    for width, height in (size, size[::-1]):
        if not reason:
            config.check_size(width, height)
            continue
        with pytest.raises(BadImageError) as error:
            config.check_size(width, height)
        assert error.value.reason == reason


def test_captions_of_unwanted_length_are_dropped_and_counted() -> None:
    config = FilterConfig(min_caption_words=2, max_caption_words=3)
    kept = config.captioned(record("one", "two words", "three words here", "far too many words"))
    assert isinstance(kept, Record)
    assert kept.texts.decode().captions == ("two words", "three words here")
    assert kept.detail == "2 captions of unwanted length dropped"
    assert kept.image_fingerprint == fingerprint("a")


def test_a_record_without_a_caption_left_is_a_reject_unless_it_has_other_texts() -> None:
    config = FilterConfig(min_caption_words=3)
    lost = config.captioned(record("short"))
    assert isinstance(lost, Reject)
    assert lost.reason == "caption-length"
    asked = config.captioned(record("short", questions=(Question(1, "what?", ("a",)),)))
    assert isinstance(asked, Record)
    assert asked.texts.decode().captions == ()


def test_a_record_whose_captions_fit_is_the_same_record() -> None:
    fitting = record("two words")
    assert FilterConfig(min_caption_words=2).captioned(fitting) is fitting


def test_a_length_that_nothing_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="min_caption_words=5 is over max_caption_words=4"):
        check(FilterConfig, {"min_caption_words": 5, "max_caption_words": 4}, "recipe")
