"""The recipe: a run as one typed document, checked before work and saved with results.

It is made of the small configs that live beside the code they steer; `--print-recipe` shows
every key with its default filled in.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from pipeline import storage
from pipeline.benchmarks.benchmark import BenchmarksConfig
from pipeline.cluster import ClusterConfig
from pipeline.config import Config, as_now, check, overridden, read
from pipeline.data.ingest.ingest import IngestConfig
from pipeline.data.media.augmentation import AugmentConfig
from pipeline.data.read.extractor_card import ExtractorCard
from pipeline.data.sources import AnySource
from pipeline.errors import ConfigError
from pipeline.models.base import ModelConfig
from pipeline.models.families import FAMILIES
from pipeline.objectives.objective import ObjectivesConfig
from pipeline.training.config import TrainingConfig
from pipeline.training.tracking.trackers import TrackersConfig
from pipeline.vision.extract import ExtractConfig
from pipeline.vision.extractors.live import live_card, refusal
from pipeline.vision.extractors.registry import AnyExtractor

RECORD = "recipe.yaml"  # in the run's folder: the recipe as it was resolved
# What the data decides; a recipe that sets them could only contradict it.
_DERIVED_SIZES = ("vocab_size", "feature_dim", "num_answers")


class MixedInPart(Config):
    """A dataset that another recipe has made, trained on beside this one's own."""

    path: str = Field(description="the dataset's folder or URL")
    split: str = Field(default="train", description="the split that is trained on")
    weight: PositiveFloat = Field(
        default=1.0, description="how often its examples are taken; the own dataset's is 1"
    )


class DatasetPart(Config):
    """Where the samples come from, and the folder or URL they are kept in."""

    path: str = Field(
        description="the folder or URL of shards, features and manifest; other runs can share it"
    )
    source: AnySource = Field(description="where samples come from")
    ingest: IngestConfig = Field(
        default=IngestConfig(), description="how the source becomes shards"
    )
    train_split: str = Field(default="train", description="the split that is trained on")
    validation_split: str = Field(
        default="validation",
        description="the split that is held out, for evaluations and benchmarks",
    )
    mixed_in: tuple[MixedInPart, ...] = Field(
        default=(),
        description="datasets of other recipes, trained on beside this one's own; each with "
        "features of the same extractor",
    )

    @model_validator(mode="after")
    def _images_can_be_treated(self) -> Self:
        self.ingest.check_source(self.source)
        return self


class FeaturesPart(Config):
    """What the model sees of an image.

    Live features are made anew for each batch and not stored: pixels that the model learns from
    itself, or those of a network that is trained in the model as its `backbone`.
    """

    extractor: AnyExtractor = Field(description="the frozen network that makes features of images")
    extract: ExtractConfig = Field(
        default=ExtractConfig(), description="the pool of actors that computes features"
    )
    live: bool = Field(
        default=False,
        description="whether features are made anew for each batch and not stored: pixels that "
        "the model learns from, or those of a network that is trained in the model as its "
        "backbone",
    )
    augment: AugmentConfig | None = Field(
        default=None, description="how live pictures are varied in training; null: not at all"
    )

    @model_validator(mode="after")
    def _can_be_live(self) -> Self:
        if self.augment is not None and not self.live:
            raise ValueError("augment: stored features are always the same; set live=true")
        reason = refusal(self.extractor) if self.live else None
        if reason is not None:
            raise ValueError(f"live=true: extractor.type={self.extractor.type}: {reason}")
        return self

    def card(self) -> ExtractorCard:
        """Returns what makes the features; raises FeatureError if its weights cannot be had."""
        if self.live:
            return live_card(self.extractor, self.augment)
        return self.extractor.build("cpu").card()


class ModelPart(Config):
    """The network and the words it reads."""

    family: Literal[tuple(FAMILIES)] = Field(  # type: ignore[valid-type]
        default="visualbert", description="the architecture"
    )
    sizes: dict[str, Any] = Field(
        default={}, description="sizes of the family's config; the others are its defaults"
    )
    initial: str | None = Field(
        default=None,
        description="a model folder whose weights pretraining starts from, as BERT's; null: "
        "from nothing",
    )
    tokenizer: str | None = Field(
        default=None, description="a vocab.txt or folder; null: built from the training texts"
    )
    vocab_size: PositiveInt = Field(
        default=8000, description="word pieces of a tokenizer that is built"
    )
    max_tokens: int = Field(
        default=40, ge=4, description="the longest text, special tokens included"
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        for name in _DERIVED_SIZES:
            if name in self.sizes:
                raise ValueError(f"sizes.{name} follows from the data; leave it out")
        self.config(vocab_size=8, feature_dim=8)
        return self

    def config(self, **derived: int) -> ModelConfig:
        """Returns the family's config with the sizes that the data decides."""
        family = FAMILIES[self.family]
        try:
            sizes: ModelConfig = family.config(**{**self.sizes, **derived})
        except ValidationError as error:
            faults = [
                f"sizes.{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
                if fault["type"] != "extra_forbidden"
                else f"sizes.{fault['loc'][0]}: unknown; allowed: "
                + ", ".join(
                    name for name in family.config.model_fields if name not in _DERIVED_SIZES
                )
                for fault in error.errors()
            ]
            raise ValueError("; ".join(faults)) from None
        if self.max_tokens > sizes.max_positions:
            raise ValueError(
                f"max_tokens={self.max_tokens} is more than sizes.max_positions="
                f"{sizes.max_positions}"
            )
        return sizes


class TrainingPart(Config):
    """How the phases are trained."""

    pretrain: TrainingConfig | None = Field(
        default=None,
        description="the phase on `objectives`; null: fine-tune from `model.initial` or from "
        "nothing",
    )
    finetune: TrainingConfig = Field(description="the phase on `benchmarks`")
    blind_twin: bool = Field(
        default=True,
        description="whether the fine-tuned model is trained again without images, to tell what "
        "they are worth",
    )
    seed: int = Field(default=0, ge=0, description="of weights, order, masking and dropout")


class Recipe(Config):
    """One run, from source files to a report."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$",
        description="the run's name, in its report and in trackers",
    )
    run: str = Field(description="the folder or URL of results")
    dataset: DatasetPart = Field(description="where samples come from, and where they are kept")
    features: FeaturesPart = Field(description="what the model sees of an image")
    model: ModelPart = Field(description="the network and the words it reads")
    objectives: ObjectivesConfig | None = Field(
        default=None, description="what pretraining trains on; null: there is no pretraining"
    )
    training: TrainingPart = Field(description="how the phases are trained")
    benchmarks: BenchmarksConfig = Field(
        description="what is fine-tuned for and evaluated: those that are given, `vqa: {}` "
        "being one"
    )
    trackers: TrackersConfig = Field(
        default=TrackersConfig(),
        description="what is told of each line that training logs: those that are given, "
        "`tensorboard: {}` being one",
    )
    cluster: ClusterConfig = Field(default=ClusterConfig(), description="where training runs")

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        if (self.training.pretrain is None) != (self.objectives is None):
            raise ValueError("objectives and training.pretrain are given together, or neither is")
        for name in ("pretrain", "finetune"):
            training: TrainingConfig | None = getattr(self.training, name)
            if training is None:
                continue
            try:
                most = max(map(training.accumulation_steps, self.cluster.world_sizes()))
            except ConfigError as error:
                raise ValueError(
                    f"training.{name}: {error} (cluster.workers, cluster.min_workers)"
                ) from None
            contrasts = name == "pretrain" and self.objectives and self.objectives.itc
            is_uneven = any(training.global_batch_size % n for n in self.cluster.world_sizes())
            if contrasts and (
                most > 1 or is_uneven or training.loading.tokens_per_micro_batch is not None
            ):
                raise ValueError(
                    "objectives.itc contrasts the whole global batch in one pass; set "
                    "global_batch_size to micro_batch_size x cluster.workers, and leave "
                    "cluster.min_workers and loading.tokens_per_micro_batch out"
                )
        return self

    @model_validator(mode="after")
    def _texts_fit_the_model(self) -> Self:
        room = self.model.config(vocab_size=8, feature_dim=8).max_positions
        for name, benchmark in self.benchmarks.build().items():
            if benchmark.max_tokens > room:
                raise ValueError(
                    f"benchmarks.{name}.max_tokens={benchmark.max_tokens} is more than "
                    f"model.sizes.max_positions={room}, the longest text that the model can read "
                    "or write; make one smaller or the other larger"
                )
        return self

    @model_validator(mode="after")
    def _objectives_suit_the_family(self) -> Self:
        family = FAMILIES[self.model.family].model
        phases = {"objectives": self.objectives, "benchmarks": self.benchmarks.objectives()}
        for key, objectives in phases.items():
            for objective in objectives.build() if objectives is not None else ():
                reason = objective.refusal(family)
                if reason is not None:
                    able = [
                        name
                        for name, other in FAMILIES.items()
                        if objective.refusal(other.model) is None
                    ]
                    raise ValueError(
                        f"model.family={self.model.family} and objective {objective.name!r} of "
                        f"{key}: {reason}; families that can: {', '.join(able)}"
                    )
        return self

    @model_validator(mode="after")
    def _evaluations_find_what_decides(self) -> Self:
        phases = {"pretrain": self.objectives, "finetune": self.benchmarks.objectives()}
        for name, objectives in phases.items():
            training: TrainingConfig | None = getattr(self.training, name)
            if training is None or objectives is None or training.evaluation.every_steps is None:
                continue
            figures = ["loss", *(objective.name for objective in objectives.build())]
            if training.evaluation.best_by not in figures:
                raise ValueError(
                    f"training.{name}.evaluation.best_by={training.evaluation.best_by}: an "
                    f"evaluation while training gives {', '.join(figures)}"
                )
        return self

    @model_validator(mode="after")
    def _teacher_sees_the_same_data(self) -> Self:
        distills = [self.benchmarks.distill, self.objectives and self.objectives.distill]
        if self.dataset.mixed_in and any(one and one.features for one in distills):
            raise ValueError(
                "dataset.mixed_in: a teacher with features of its own reads one dataset; leave "
                "distill.features out, or train on one"
            )
        return self

    @model_validator(mode="after")
    def _objectives_suit_a_backbone(self) -> Self:
        if not self.features.live or self.features.extractor.type == "pixels":
            return self
        if self.objectives and self.objectives.mrm:
            raise ValueError(
                "objectives.mrm: a backbone sees the whole picture, so that no region of it can be "
                "hidden; leave mrm out, or use stored features"
            )
        for key, phase in (("objectives", self.objectives), ("benchmarks", self.benchmarks)):
            if phase and phase.distill and phase.distill.features is None:
                raise ValueError(
                    f"{key}.distill: the teacher would be given what the backbone is; give "
                    "distill.features, the stored ones that it was trained on"
                )
        return self

    @model_validator(mode="after")
    def _trackers_can_write(self) -> Self:
        for name in ("tensorboard", "wandb"):
            if getattr(self.trackers, name) is not None and not storage.is_local(self.run):
                raise ValueError(
                    f"trackers.{name} writes files beside the run, and run={self.run} is no folder "
                    "of a file system; use mlflow, or a local run"
                )
        return self

    def teachers(self) -> dict[str, str]:
        """Returns the model folders that are learned from, by the key that names each."""
        phases = {"benchmarks": self.benchmarks.objectives()}
        if self.objectives:
            phases["objectives"] = self.objectives
        return {
            f"{phase}.{key}": location
            for phase, objectives in phases.items()
            for key, location in objectives.locations().items()
        }

    def relative_locations(self) -> list[str]:
        """Returns the paths that mean something only from the folder the recipe is used in."""
        given = [
            self.run,
            self.dataset.path,
            *(other.path for other in self.dataset.mixed_in),
            self.model.initial,
            self.model.tokenizer,
            *self.dataset.source.locations().values(),
            *self.teachers().values(),
        ]
        return [
            location
            for location in given
            if location and storage.is_local(location) and not storage.is_absolute(location)
        ]

    def on_cluster(self) -> Self:
        """Returns the recipe as a job runs it: on the Ray that the job is part of."""
        return self.model_copy(
            update={"cluster": self.cluster.model_copy(update={"address": "auto", "runner": "ray"})}
        )


def load(location: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe with overrides, or raises ConfigError.

    RUN/recipe.yaml, which an earlier release may have written, is read by the keys it had.
    """
    document = read(location)
    run = document.get("run")
    is_record = isinstance(run, str) and storage.absolute(location) == storage.join(
        storage.absolute(run), RECORD
    )
    if is_record and isinstance(document.get("training"), dict):
        document["training"] = {
            name: as_now(TrainingConfig, part) if isinstance(part, dict) else part
            for name, part in document["training"].items()
        }
    return check(Recipe, overridden(document, overrides), location)
