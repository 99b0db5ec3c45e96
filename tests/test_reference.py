"""What the configs say of their fields, in a recipe with comments and in docs/recipe.md."""

from pathlib import Path

import pytest

from pipeline import config
from pipeline.config import Change, Config
from pipeline.recipe import Recipe
from pipeline.reference import allowed, change, configs, explained, page

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "jobs" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("part", configs(), ids=lambda part: part.__name__)
def test_every_key_of_a_recipe_says_what_it_means(part: type[Config]) -> None:
    for name, field in part.model_fields.items():
        assert field.description, f"{part.__name__}.{name} has no description"
        assert allowed(field)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_an_explained_recipe_is_that_recipe(path: Path, tmp_path: Path) -> None:
    recipe = config.load(Recipe, str(path))
    (tmp_path / "explained.yaml").write_text(explained(recipe))
    assert config.load(Recipe, str(tmp_path / "explained.yaml")) == recipe


def test_a_key_stands_below_its_meaning_its_values_its_default_and_its_change() -> None:
    text = explained(config.load(Recipe, str(ROOT / "jobs" / "recipes" / "quickstart.yaml")))
    lines = [line.strip() for line in text.splitlines()]
    at = lines.index("learning_rate: 0.002")
    assert " ".join(line.lstrip("# ") for line in lines[at - 2 : at]) == (
        "the peak, reached at the end of the warm-up (number over 0; default: 0.0001; a run goes "
        "on with another value only with --from-checkpoint)"
    )


def test_what_a_phase_records_of_the_recipe_has_the_change_of_its_record() -> None:
    fields = Recipe.model_fields
    assert change(fields["objectives"], "objectives") is Change.NEVER
    assert change(fields["cluster"], "cluster") is None


def test_the_page_of_keys_is_up_to_date() -> None:
    assert (ROOT / "docs" / "recipe.md").read_text() == page(), "run `make reference`"
