"""The benchmarks by name, and a recipe's choice among them."""

from typing import Any, Self

from pydantic import Field, model_validator

from pipeline.benchmarks.base import Benchmark
from pipeline.benchmarks.caption import Caption, CaptionConfig
from pipeline.benchmarks.vqa import Vqa, VqaConfig
from pipeline.config import Config
from pipeline.objectives.distill import DistillConfig
from pipeline.objectives.objective import ObjectivesConfig


class BenchmarksConfig(Config):
    """What a model is fine-tuned for and scored on: those that are given, `vqa: {}` being one."""

    vqa: VqaConfig | None = Field(
        default=None,
        description="visual question answering: an answer head over the commonest answers",
    )
    caption: CaptionConfig | None = Field(
        default=None, description="captions, written token by token"
    )
    distill: DistillConfig | None = Field(
        default=None, description="no benchmark: a teacher, learned from while fine-tuning"
    )

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.build():
            raise ValueError(f"no benchmark is given; choose from {', '.join(BENCHMARKS)}")
        return self

    def build(self) -> dict[str, Benchmark[Any]]:
        """Returns the chosen benchmarks by name."""
        chosen = [self.vqa, self.caption]
        benchmarks = [config.build() for config in chosen if config is not None]
        return {benchmark.name: benchmark for benchmark in benchmarks}

    def objectives(self) -> ObjectivesConfig:
        """Returns what one model is fine-tuned on to do all of them."""
        settings: dict[str, dict[str, Any]] = {}
        for benchmark in self.build().values():
            settings |= benchmark.objectives()
        if self.distill is not None:
            settings["distill"] = self.distill.model_dump(mode="json", exclude_none=True)
        return ObjectivesConfig.model_validate(settings)

    def max_tokens(self) -> int:
        """Returns the longest text that one of them reads or writes."""
        return max(benchmark.max_tokens for benchmark in self.build().values())


BENCHMARKS: dict[str, type[Benchmark[Any]]] = {"vqa": Vqa, "caption": Caption}
