"""How a recipe chooses benchmarks."""

import pytest

from pipeline import config
from pipeline.benchmarks.benchmark import BENCHMARKS, BenchmarksConfig
from pipeline.benchmarks.vqa import VqaConfig
from pipeline.errors import ConfigError


def test_the_chosen_benchmarks_are_built_with_their_objectives() -> None:
    chosen = config.check(
        BenchmarksConfig,
        {"vqa": {"answer": {"weight": 2}, "max_tokens": 20}, "caption": {"max_tokens": 30}},
        "recipe",
    )
    assert list(chosen.build()) == list(BENCHMARKS) == ["vqa", "caption"]
    assert chosen.objectives().settings() == {"answer": {"weight": 2.0}, "lm": {"weight": 1.0}}
    assert chosen.max_tokens() == 30


def test_only_what_is_chosen_is_trained() -> None:
    assert BenchmarksConfig(vqa=VqaConfig()).objectives().settings() == {"answer": {"weight": 1.0}}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "no benchmark is given; choose from vqa, caption"),
        ({"qva": {}}, "did you mean 'vqa'"),
        ({"caption": {"metrics": ["spice"]}}, "caption.metrics"),
        ({"caption": {"beams": 0}}, "caption.beams"),
        ({"vqa": {"max_tokens": 3}}, "vqa.max_tokens"),
    ],
)
def test_an_impossible_choice_is_refused(document: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.check(BenchmarksConfig, document, "recipe")
