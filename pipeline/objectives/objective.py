"""The objectives by name, and how a recipe chooses among them."""

from typing import Self

from pydantic import model_validator

from pipeline.config import Config
from pipeline.objectives.answer import AnswerConfig, Answering
from pipeline.objectives.base import Objective
from pipeline.objectives.itm import ImageTextMatching, ItmConfig
from pipeline.objectives.lm import LanguageModelling, LmConfig
from pipeline.objectives.mlm import MaskedLanguageModelling, MlmConfig


class ObjectivesConfig(Config):
    """What a phase is trained on: the weighted sum of those that are given, `mlm: {}` being one."""

    mlm: MlmConfig | None = None
    itm: ItmConfig | None = None
    lm: LmConfig | None = None
    answer: AnswerConfig | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.settings():
            raise ValueError(f"no objective is given; choose from {', '.join(type(self).names())}")
        return self

    @classmethod
    def names(cls) -> list[str]:
        """Returns the names of all objectives there are."""
        return list(cls.model_fields)

    def settings(self) -> dict[str, dict[str, object]]:
        """Returns the chosen objectives' settings by name, as plain data."""
        return self.model_dump(mode="json", exclude_none=True)

    def build(self) -> list[Objective]:
        """Returns the chosen objectives, in an order that does not depend on the recipe's."""
        chosen: list[Objective] = []
        if self.itm:  # first: it chooses the caption that the others read
            chosen.append(ImageTextMatching(self.itm))
        if self.mlm:
            chosen.append(MaskedLanguageModelling(self.mlm))
        if self.lm:
            chosen.append(LanguageModelling(self.lm))
        if self.answer:
            chosen.append(Answering(self.answer))
        return chosen


def by_stream(objectives: list[Objective]) -> dict[str, list[Objective]]:
    """Groups objectives by the name of their stream, in the order they come."""
    streams: dict[str, list[Objective]] = {}
    for objective in objectives:
        streams.setdefault(objective.stream.name, []).append(objective)
    return streams
