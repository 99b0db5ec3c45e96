import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.data.media.augmentation import AugmentConfig, View, may_be_mirrored, random_view
from pipeline.data.sample import Dialog, Question, Round, Texts

SILENT = Texts(1, captions=("a dog on the grass",))


def drawn(config: AugmentConfig, width: int, height: int, texts: Texts, seed: int) -> View:
    return random_view(config, width, height, texts, np.random.default_rng(seed))


@settings(deadline=None)
@given(st.integers(1, 900), st.integers(1, 700), st.integers(0, 10_000))
def test_a_view_lies_within_the_picture_and_holds_a_pixel(
    width: int, height: int, seed: int
) -> None:
    view = drawn(AugmentConfig(area=(0.01, 1.0), aspect=(0.1, 10.0)), width, height, SILENT, seed)
    assert 0 <= view.left < view.right <= width
    assert 0 <= view.top < view.bottom <= height


def test_views_have_the_areas_and_aspects_asked_for_and_reach_every_edge() -> None:
    config = AugmentConfig(area=(0.2, 0.5), aspect=(0.5, 1.5))
    views = [drawn(config, 600, 600, SILENT, seed) for seed in range(2000)]
    sizes = np.array([(view.right - view.left, view.bottom - view.top) for view in views])
    areas, aspects = sizes.prod(axis=1) / 600**2, sizes[:, 0] / sizes[:, 1]
    assert 0.195 < areas.min() < 0.21
    assert 0.49 < areas.max() < 0.505
    assert areas.mean() == pytest.approx(0.35, abs=0.01)
    assert 0.49 < aspects.min() < 0.52
    assert 1.45 < aspects.max() < 1.51
    assert np.log(aspects).mean() == pytest.approx(math.log(0.5 * 1.5) / 2, abs=0.02)
    assert min(view.left for view in views) == min(view.top for view in views) == 0
    assert max(view.right for view in views) == max(view.bottom for view in views) == 600


def test_pictures_are_mirrored_as_often_as_asked_for_and_only_if_their_texts_allow_it() -> None:
    sided = Texts(1, captions=("a dog on the grass", "a cat to the LEFT of a dog"))
    for mirror in (0.0, 0.3, 1.0):
        config = AugmentConfig(mirror=mirror)
        views = [drawn(config, 60, 40, SILENT, seed) for seed in range(1000)]
        share = sum(view.is_mirrored for view in views) / 1000
        assert share == pytest.approx(mirror, abs=0.05)
        kept = [drawn(config, 60, 40, sided, seed) for seed in range(1000)]
        assert not any(view.is_mirrored for view in kept)
        # whether it may be mirrored moves no crop
        assert [view.left for view in kept] == [view.left for view in views]


@pytest.mark.parametrize(
    "texts",
    [
        Texts(1, captions=("a man, right-handed, throws",)),
        Texts(1, questions=(Question(1, "What does the sign say?", ("stop",)),)),
        Texts(1, questions=(Question(1, "Where is the cat?", ("on sofa", "on the left")),)),
        Texts(1, dialogs=(Dialog("a street", (Round("is there a clock?", "no"),)),)),
        Texts(1, dialogs=(Dialog("a street", (Round("where is it?", "to the right"),)),)),
        Texts(1, dialogs=(Dialog("a bus on the left", ()),)),
    ],
)
def test_any_text_of_an_image_can_forbid_the_mirror(texts: Texts) -> None:
    assert not may_be_mirrored(texts)


def test_words_that_only_contain_a_sided_word_forbid_nothing() -> None:
    assert may_be_mirrored(Texts(1, captions=("a bright aerial of a bread cleft",)))
    assert may_be_mirrored(Texts(1))


def test_ranges_that_are_none_are_refused() -> None:
    with pytest.raises(ValidationError, match="area="):
        AugmentConfig(area=(0.0, 1.0))
    with pytest.raises(ValidationError, match="area="):
        AugmentConfig(area=(0.9, 0.3))
    with pytest.raises(ValidationError, match="aspect="):
        AugmentConfig(aspect=(2.0, 1.0))
