"""The report stage: one HTML page of what a run left."""

from pipeline import storage
from pipeline.recipe import Recipe
from pipeline.report.run_report import write_report
from pipeline.stages.progress import StageProgress
from pipeline.stages.state import Outcome, Record, once

REPORT_VERSION = 1


def run(recipe: Recipe, _progress: StageProgress) -> Outcome:
    """Writes RUN/report.html unless it shows the run as it is."""
    before = {
        stage: Record.read(recipe.run, stage)
        for stage in ("ingest", "extract", "pretrain", "finetune", "evaluate")
    }
    parts = {
        "code": REPORT_VERSION,
        "recipe": recipe.model_dump(mode="json"),
        "stages": {name: record.identity if record else None for name, record in before.items()},
    }
    return once(
        recipe.run,
        "report",
        parts,
        lambda: {"report": write_report(recipe.run)},
        leaves=[storage.join(recipe.run, "report.html")],
    )
