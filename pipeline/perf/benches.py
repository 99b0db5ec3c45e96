"""The benches by name, each with its settings."""

from collections.abc import Callable
from typing import Any, NamedTuple

from pipeline.config import Config
from pipeline.perf import extract, ingest, loader, model, scale, train
from pipeline.perf.result import Result


class Bench(NamedTuple):
    """`run(config, show)` gives `show` each table when it is made."""

    config: type[Config]
    run: Callable[[Any, Callable[[Any], None]], Result]


BENCHES = {
    "ingest": Bench(ingest.IngestBenchConfig, ingest.run),
    "loader": Bench(loader.LoaderBenchConfig, loader.run),
    "extract": Bench(extract.ExtractBenchConfig, extract.run),
    "model": Bench(model.ModelBenchConfig, model.run),
    "scale": Bench(scale.ScaleBenchConfig, scale.run),
    "train": Bench(train.TrainBenchConfig, train.run),
}
