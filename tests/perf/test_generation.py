"""Both sides of a generation write the same."""

import pytest
import torch

from pipeline.errors import ModelError
from pipeline.models.generation import generate
from pipeline.models.visualbert import VisualBert
from pipeline.perf.generation import NO_END, Generation, uncached
from pipeline.perf.model import captionless_images, prefix_config, visualbert_config

CPU = torch.device("cpu")


def test_reading_everything_anew_writes_what_the_cache_writes() -> None:
    config = visualbert_config("tiny")
    torch.manual_seed(3)
    model = VisualBert(config).eval()
    inputs = captionless_images(3, config.feature_dim, CPU, torch.float32)
    again = uncached(model, inputs, 6)
    assert again == generate(model, inputs, eos=NO_END, max_new_tokens=6)
    assert [len(text) for text in again] == [6] * 3


def test_all_comparisons_agree_on_their_texts() -> None:
    config = visualbert_config("tiny")
    torch.manual_seed(3)
    inputs = captionless_images(3, config.feature_dim, CPU, torch.float32)
    generation = Generation(inputs, 5, 1, CPU, torch.float32)
    for comparison in (
        generation.cached_and_uncached(config),
        generation.stream_and_transformers(config),
        generation.prefix_and_transformers(prefix_config("tiny")),
    ):
        assert comparison.figures == {"texts": 3, "texts_that_agree": 3}
        assert len(comparison.seconds) == 2


def test_texts_that_differ_are_an_error() -> None:
    inputs = captionless_images(1, 8, CPU, torch.float32)
    writers = {"one": lambda: [[1, 2]], "two": lambda: [[1, 3]]}
    with pytest.raises(ModelError, match="0 of 1 texts agree"):
        Generation(inputs, 2, 1, CPU, torch.float32).compare("title", writers)


def test_captionless_images_differ_from_each_other() -> None:
    inputs = captionless_images(4, 6, CPU, torch.float32)
    assert inputs.features.shape == (4, 36, 6)
    assert not torch.equal(inputs.features[0], inputs.features[1])
