"""The quickstart recipe in the size of a test: small, but every part of it real."""

from pathlib import Path

from pipeline import config
from pipeline.recipe import Recipe

QUICKSTART = str(Path(__file__).resolve().parents[2] / "jobs" / "recipes" / "quickstart.yaml")
SMALL = [
    "dataset.source.scenes=40",
    "dataset.source.validation_scenes=12",
    "dataset.ingest.samples_per_shard=16",
    "cluster={runner: process, workers: 1}",
    "model.sizes={width: 16, num_layers: 1, num_heads: 2, intermediate_size: 24, "
    "max_positions: 32, dropout: 0.0, position_fourier: 8}",
    *(
        f"training.{phase}.{setting}"
        for phase in ("pretrain", "finetune")
        for setting in (
            "steps=3",
            "global_batch_size=8",
            "micro_batch_size=4",
            "schedule.warmup_steps=1",
        )
    ),
]


def small(run: Path, *overrides: str) -> Recipe:
    places = [f"run={run / 'run'}", f"dataset.path={run / 'data'}"]
    return config.load(Recipe, QUICKSTART, [*SMALL, *places, *overrides])
