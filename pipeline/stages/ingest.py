"""The ingest stage: source files to samples in listed shards."""

import time
from functools import partial

from pipeline.cluster import start_ray
from pipeline.data.ingest.ingest import ingest
from pipeline.recipe import Recipe
from pipeline.stages.progress import StageProgress
from pipeline.stages.state import Outcome, Record, identity

NAME = "ingest"


def run(recipe: Recipe, progress: StageProgress, allow_removals: bool = False) -> Outcome:
    """Brings the dataset up to date with its source; it is incremental by itself.

    `allow_removals` lets any number of samples go, whatever the recipe allows.
    """
    started = time.monotonic()
    config = recipe.dataset.ingest
    if recipe.cluster.runner == "process":
        config = config.model_copy(update={"shards_in_flight": 0})
    if allow_removals:
        config = config.model_copy(update={"max_removed_fraction": 1.0})
    report = ingest(
        recipe.dataset.source.build(),
        recipe.dataset.path,
        config,
        on_progress=progress.update,
        start_ray=partial(start_ray, recipe.cluster),
    )
    outputs = {
        "version": report.version,
        "samples": report.num_live,
        "added": report.num_added,
        "edited": report.num_edited,
        "removed": report.num_removed,
        "unchanged": report.num_unchanged,
        "rejects": dict(report.rejects),
    }
    changed = report.num_added or report.num_edited or report.num_removed
    before = Record.read(recipe.run, NAME)
    if not changed and before:
        return Outcome("up to date", before.seconds, outputs)
    seconds = time.monotonic() - started
    Record(identity({"version": report.version}), "done", seconds, outputs).write(recipe.run, NAME)
    return Outcome("done" if changed else "up to date", seconds, outputs)
