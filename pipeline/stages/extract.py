"""The extract stage: samples to visual features beside them."""

import time
from functools import partial

from pipeline.cluster import start_ray
from pipeline.data.read.dataset import Dataset
from pipeline.recipe import Recipe
from pipeline.stages.preflight import require_splits
from pipeline.stages.progress import StageProgress
from pipeline.stages.state import Outcome, Record, identity
from pipeline.vision.extract import ExtractProgress, extract

NAME = "extract"


def run(recipe: Recipe, progress: StageProgress) -> Outcome:
    """Gives every sample the features it lacks; it is incremental by itself."""
    require_splits(recipe, Dataset.open(recipe.dataset.path))
    if recipe.features.live:
        return Outcome("nothing to store", 0.0, {})
    started = time.monotonic()
    config = recipe.features.extract
    if recipe.cluster.runner == "process":
        config = config.model_copy(update={"actors": 0})

    def show(done: ExtractProgress) -> None:
        figures = f"{done.images_per_second:.0f} images/s"
        if done.num_done:
            figures += f", network waited {done.waited_fraction:.0%}"
        progress.update(done.num_done, done.num_to_do, figures)

    report = extract(
        recipe.dataset.path,
        recipe.features.extractor,
        config,
        on_progress=show,
        start_ray=partial(start_ray, recipe.cluster),
    )
    outputs = {
        "features": report.extractor,
        "images": report.num_images,
        "unchanged": report.num_unchanged,
        "rejects": dict(report.rejects),
        "bytes": report.size_bytes,
        "images_per_second": round(report.images_per_second, 1),
        "network_waited": round(report.waited_fraction, 3),
    }
    before = Record.read(recipe.run, NAME)
    if not report.num_images and before and before.outputs.get("features") == report.extractor:
        return Outcome("up to date", before.seconds, before.outputs)
    seconds = time.monotonic() - started
    Record(identity({"features": report.extractor}), "done", seconds, outputs).write(
        recipe.run, NAME
    )
    return Outcome("done" if report.num_images else "up to date", seconds, outputs)
