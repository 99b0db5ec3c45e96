from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field, model_validator

from pipeline import config
from pipeline.config import Change, Config, Fixed, Free
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


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("name: a\nname: b\ndataset: {}", "the key 'name' is given twice"),
        ("dataset:\n  batch: 2\n  source: {}\n  batch: 4", "the key 'batch' is given twice"),
        (f"name: {'[' * 5000}{']' * 5000}", "nested too deeply"),
        (f"name: {'{a: ' * 3000}1{'}' * 3000}", "nested too deeply"),
        (f"name: {'[' * 200}{']' * 200}", "nested over 50 deep"),
        ("name: &a [*a]", "an alias stands within its own anchor"),
        (f"name: {'9' * 5000}", "a value cannot be read: Exceeds the limit"),
        ("name: 2024-02-31", "a value cannot be read: day is out of range"),
        ("name: !!bool maybe", "a value cannot be read"),
        ("name: !!timestamp maybe", "a value cannot be read"),
        ("name: !!python/object:os.system x", "not valid YAML"),
        ('name: "\\ud800"', "half a surrogate pair"),
        ("name: x\ndataset: {source: {type: circle, radius: .inf}}", "radius: found inf"),
        ("name: x\ndataset: {source: {type: circle, radius: 1.0e999}}", "radius: found '1.0e999'"),
        ("name: \xff", "not valid YAML"),
        ("- a\n- b", "expected a mapping"),
    ],
)
def test_yaml_that_is_no_recipe_is_one_sentence(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=match) as found:
        config.load(Whole, str(path))
    assert str(path) in str(found.value)


def test_a_merged_mapping_may_be_merged_again(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "base: &base {name: a}\nouter:\n  inner: &inner {<<: *base, name: b}\n"
        "last: {<<: *inner, other: c}\n"
    )
    with pytest.raises(ConfigError, match="base") as found:
        config.load(Whole, str(path))
    assert "given twice" not in str(found.value)  # only what the keys are is wrong


def test_aliases_are_counted_as_often_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 10)}]" for n in range(12)]
    path.write_text("\n".join(levels))
    with pytest.raises(ConfigError, match="over 100000 values once its aliases are written out"):
        config.load(Whole, str(path))
    path.write_text(f"parts: [&part {{side: 2}}, {{<<: *part, side: 3}}]\n{RECIPE}")
    with pytest.raises(ConfigError, match="parts: unknown key"):  # a key beside `<<` overrides
        config.load(Whole, str(path))


@pytest.mark.parametrize("override", ["name=" + "[" * 5000, "name=" + "9" * 5000, "name=\udcff"])
def test_an_override_that_cannot_be_read_is_one_short_sentence(recipe: str, override: str) -> None:
    with pytest.raises(ConfigError, match="override 'name=") as found:
        config.load(Whole, recipe, [override])
    assert len(str(found.value)) < 700


class Rate(Config):
    peak: Fixed[float] = 1.0
    decay: Free[str] = "linear"


class Run(Config):
    moved: ClassVar[Mapping[str, str]] = {"peak_rate": "rate.peak", "rate_decay": "rate.decay"}

    steps: Free[int] = 3
    rate: Rate = Rate()
    shape: Fixed[Rate] = Rate()  # one setting, not a group: it has a word on change


def test_settings_of_groups_have_dotted_keys_and_their_own_change() -> None:
    assert list(config.settings(Run)) == ["steps", "rate.peak", "rate.decay", "shape"]
    assert config.change_of(Run, "rate.peak") is Change.NEVER
    assert config.change_of(Run, "rate.decay") is Change.FREELY
    assert config.change_of(Run, "shape") is Change.NEVER


def test_settings_are_selected_by_key_and_those_that_are_absent_left_out() -> None:
    document = {"rate": {"peak": 2.0, "other": 1}, "steps": 4}
    assert config.value_at(document, "rate.peak") == 2.0
    for absent in ("rate.decay", "steps.more", "gone"):
        with pytest.raises(KeyError):
            config.value_at(document, absent)
    assert config.selected(document, ["rate.peak", "rate.decay"]) == {"rate": {"peak": 2.0}}


def test_data_of_an_earlier_release_is_read_by_the_keys_of_now() -> None:
    flat = {"steps": 4, "peak_rate": 2.0, "rate_decay": "cosine"}
    now = {"steps": 4, "rate": {"peak": 2.0, "decay": "cosine"}}
    assert config.as_now(Run, flat) == now
    assert config.as_now(Run, now) == now


def test_a_key_of_an_earlier_release_is_refused_with_the_key_that_it_is_now() -> None:
    with pytest.raises(ConfigError, match=r"peak_rate: .* it is rate\.peak now"):
        config.check(Run, {"peak_rate": 2.0}, "recipe.yaml")
