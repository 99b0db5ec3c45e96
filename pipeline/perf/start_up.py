"""The time from a command to its first step, part by part.

Run by the bench as a process of its own: `python -m pipeline.perf.start_up RECIPE OUTPUT`. It
does what `sightline pretrain RECIPE` does, in the same order, up to one step, and writes JSON:
what was finished, and when, in seconds since 1970.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(recipe_location: str, output: str) -> None:
    """Writes each part of the way with the time at which it was done, in order."""
    done: dict[str, float] = {}

    from pipeline import config
    from pipeline.cluster import start_ray
    from pipeline.perf.steps import MARKS, Marked
    from pipeline.recipe import Recipe
    from pipeline.stages.data_inputs import DataInputs
    from pipeline.stages.phase_spec import phase_specs
    from pipeline.training.launch.launch import launch

    done["Python and its imports"] = time.time()
    recipe = config.load(Recipe, recipe_location)
    inputs = DataInputs.open(recipe)
    spec = phase_specs(recipe, inputs)[0]
    done["recipe, dataset and tokenizer opened"] = time.time()
    start_ray(recipe.cluster)
    done["Ray started"] = time.time()
    lines: list[dict[str, Any]] = []
    launch(spec, recipe.cluster, lines.append, Marked())
    marks = Path(spec.folder) / MARKS.format(rank=0)
    first = json.loads(marks.read_text().splitlines()[0])
    done["ranks started, with their imports"] = first["called"]
    done["model and data built"] = first["assembled"]
    done["DeepSpeed imported, engine built"] = next(
        line["time"] for line in lines if line.get("event") == "started"
    )
    done["first step"] = next(line["time"] for line in lines if "loss" in line)
    Path(output).write_text(json.dumps(done))


if __name__ == "__main__":
    main(*sys.argv[1:])
