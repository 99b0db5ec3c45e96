from pathlib import Path

from rich.console import Console

from pipeline.recipe import Recipe
from pipeline.stages import report
from pipeline.stages.progress import StageProgress
from pipeline.stages.state import Record
from tests.stages.small_recipe import small


def written(recipe: Recipe) -> str:
    with StageProgress(Console(stderr=True, quiet=True), "report") as progress:
        return report.run(recipe, progress).state


def test_it_is_written_anew_when_what_it_shows_has_changed_or_it_has_gone(
    finished: Path, tmp_path: Path
) -> None:
    recipe, page = small(finished), finished / "run" / "report.html"
    assert written(recipe) == "up to date"
    page.unlink()
    assert written(recipe) == "done"
    assert "<html" in page.read_text()
    Record("another", "done", 1.0, {"headlines": {}}).write(recipe.run, "evaluate")
    assert written(recipe) == "done"
    assert written(recipe) == "up to date"
    assert written(small(finished, f"dataset.path={tmp_path / 'elsewhere'}")) == "done"
