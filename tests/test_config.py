from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, model_validator

from pipeline import config
from pipeline.config import Config
from pipeline.errors import ConfigError


class Square(Config):
    type: Literal["square"] = "square"
    side: int = 3


class Circle(Config):
    type: Literal["circle"] = "circle"
    radius: float = Field(1.0, gt=0)


class Part(Config):
    source: Annotated[Square | Circle, Field(discriminator="type")]
    batch: int = 8


class Whole(Config):
    name: str
    dataset: Part

    @model_validator(mode="after")
    def _batch_is_even(self) -> "Whole":
        if self.dataset.batch % 2:
            raise ValueError("dataset.batch must be even")
        return self


RECIPE = "name: first\ndataset:\n  source: {type: square, side: 5}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


def test_overrides_reach_nested_keys_and_keep_their_types(recipe: str) -> None:
    whole = config.load(Whole, recipe, ["dataset.source.side=7", "name='8'"])
    assert isinstance(whole.dataset.source, Square)
    assert whole.dataset.source.side == 7
    assert whole.name == "8"


def test_what_is_printed_is_read_back(recipe: str, tmp_path: Path) -> None:
    whole = config.load(Whole, recipe)
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml(whole))
    assert config.load(Whole, str(again)) == whole


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.bach=3", r"dataset\.bach: unknown key; did you mean 'batch'\? allowed: batch"),
        ("dataset.source.sides=3", r"dataset\.source\.sides: unknown key; did you mean 'side'"),
        ("dataset.batch=three", r"dataset\.batch: found 'three'; .*valid integer"),
        ("dataset.batch=3", r"dataset\.batch must be even"),
        ("dataset.source.type=triangle", r"dataset\.source.*triangle.*square.*circle"),
        ("dataset.source={type: circle, radius: -1}", r"dataset\.source\.radius: found -1"),
        ("nonsense", r"override 'nonsense': expected dotted\.key=value"),
        ("nmae=x", r"nmae: unknown key; did you mean 'name'"),
    ],
)
def test_a_fault_names_key_found_and_allowed(recipe: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(Whole, recipe, [override])


def test_every_fault_is_listed_at_once(recipe: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config.load(Whole, recipe, ["dataset.bach=1", "nmae=2"])
    assert str(raised.value).count("unknown key") == 2


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: x\ndataset: {batch: 2}\n")
    with pytest.raises(ConfigError, match=r"dataset\.source: missing"):
        config.load(Whole, str(path))


def test_a_file_that_is_not_a_mapping_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping of keys, found list"):
        config.load(Whole, str(path))
    path.write_text("a: [1\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.load(Whole, str(path))
