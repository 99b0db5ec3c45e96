"""The objectives by name, and a recipe's choice among them."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from pipeline import storage
from pipeline.config import Config
from pipeline.objectives.answer import AnswerConfig
from pipeline.objectives.base import Objective
from pipeline.objectives.distill import DistillConfig
from pipeline.objectives.itc import ItcConfig
from pipeline.objectives.itm import ItmConfig
from pipeline.objectives.lm import LmConfig
from pipeline.objectives.mlm import MlmConfig
from pipeline.objectives.mrm import MrmConfig
from pipeline.objectives.qa import QaConfig
from pipeline.objectives.turns import Turns

Share = Annotated[float, Field(gt=0)]


class ObjectivesConfig(Config):
    """What a phase is trained on: those that are given, `mlm: {}` being one.

    A step trains the weighted sum of all; or, with `one_per_step: {mlm: 2, itm: 1}`, one of them,
    drawn with these shares.
    """

    mlm: MlmConfig | None = Field(default=None, description="masked language modelling")
    itm: ItmConfig | None = Field(default=None, description="image–text matching")
    mrm: MrmConfig | None = Field(default=None, description="masked region modelling")
    itc: ItcConfig | None = Field(default=None, description="image–text contrast")
    lm: LmConfig | None = Field(
        default=None,
        description="language modelling under a prefix mask: what captions are written with",
    )
    answer: AnswerConfig | None = Field(
        default=None, description="answers to questions, against soft scores"
    )
    qa: QaConfig | None = Field(
        default=None, description="answers to questions in pretraining, as LXMERT's"
    )
    distill: DistillConfig | None = Field(default=None, description="learning from a teacher")
    one_per_step: dict[str, Share] | None = Field(
        default=None,
        description="a step trains one objective, drawn with these shares; null: the weighted "
        "sum of all",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        chosen = self._chosen()
        if not chosen:
            raise ValueError(f"no objective is given; choose from {', '.join(type(self).names())}")
        if self.one_per_step is not None and set(self.one_per_step) != set(chosen):
            raise ValueError(
                f"one_per_step gives shares to {', '.join(sorted(self.one_per_step))}, but the "
                f"objectives are {', '.join(sorted(chosen))}; give each of them a share"
            )
        if self.distill is not None and self.distill.words is not None:
            hidden_in = self.mlm.texts if self.mlm is not None else ()
            if self.distill.texts not in hidden_in or self.one_per_step is not None:
                raise ValueError(
                    "distill.words compares the words that mlm hides in the same step; give mlm "
                    f"with texts: [{self.distill.texts}], and no one_per_step"
                )
        return self

    @classmethod
    def names(cls) -> list[str]:
        """Returns the names of all objectives there are."""
        return [name for name in cls.model_fields if name != "one_per_step"]

    def settings(self) -> dict[str, dict[str, Any]]:
        """Returns the choice as plain data that any process can build from."""
        settings = self.model_dump(mode="json", exclude_none=True)
        if self.distill is not None:
            settings["distill"]["teacher"] = storage.absolute(self.distill.teacher)
        return settings

    def locations(self) -> dict[str, str]:
        """Returns the files and folders that are read, by the key that names each."""
        return {} if self.distill is None else {"distill.teacher": self.distill.teacher}

    def build(self) -> list[Objective]:
        """Returns the chosen objectives, in an order that does not depend on the recipe's."""
        built: list[Objective] = []
        for name, config in self._chosen().items():
            objectives: Sequence[Objective] = config.build()
            for objective in objectives:
                if self.one_per_step is not None:
                    objective.turns = Turns(name, self.one_per_step)
            built += objectives
        return built

    def _chosen(self) -> dict[str, Any]:
        """Returns the chosen configs in the order in which they prepare a batch.

        Matching is first, as it chooses the text that the others read; the teacher is last, as it
        sees what they have hidden.
        """
        ordered: Mapping[str, Config | None] = {
            "itm": self.itm,
            "mlm": self.mlm,
            "mrm": self.mrm,
            "itc": self.itc,
            "lm": self.lm,
            "answer": self.answer,
            "qa": self.qa,
            "distill": self.distill,
        }
        return {name: config for name, config in ordered.items() if config is not None}


def by_stream(objectives: list[Objective]) -> dict[str, list[Objective]]:
    """Groups objectives by the name of their stream, in the order they come."""
    streams: dict[str, list[Objective]] = {}
    for objective in objectives:
        streams.setdefault(objective.stream.name, []).append(objective)
    return streams
