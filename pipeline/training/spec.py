"""The training spec: plain data that is saved, compared and sent to every rank."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from pipeline import storage
from pipeline.config import Change, Config, Fixed, Free, OnRequest, change_of
from pipeline.data.read.images import LiveConfig
from pipeline.models.generation import Decoding
from pipeline.training.config import TrainingConfig
from pipeline.vision.extractors.grid import GridConfig


def training_key(phase: str) -> str:
    """Returns the recipe's key of how a phase is trained."""
    return "training.pretrain" if phase == "pretrain" else "training.finetune"


class MixedIn(Config):
    """A split of another dataset that a phase trains on beside its own, whose weight is 1."""

    dataset: str
    dataset_version: int
    split: str
    weight: PositiveFloat

    @field_validator("dataset")
    @classmethod
    def _absolute(cls, location: str) -> str:
        return storage.absolute(location)


class TrainingSpec(Config):
    """One phase of training, as every rank receives it: plain values, no objects.

    Folders and the dataset are locations (local paths or URLs). `model` is the config of the
    family `family`, `objectives` maps an objective's name to its config. A field's title is the
    recipe's key for it, where it is not `training.<phase>`.
    """

    phase: Free[str]  # pretrain, finetune, blind
    # RUN/<phase>: checkpoints/, metrics.jsonl, events.jsonl, model/, result.json
    folder: Free[str]
    dataset: OnRequest[str] = Field(title="dataset.path")
    dataset_version: Fixed[int] = Field(title="dataset.path: version")
    split: Fixed[str] = Field(default="train", title="dataset.train_split")
    mixed_in: Fixed[tuple[MixedIn, ...]] = Field(default=(), title="dataset.mixed_in")
    # what is evaluated on while training
    held_out_split: OnRequest[str | None] = Field(default=None, title="dataset.validation_split")
    # the extractor's folder name; None: live features, or text only
    features: Fixed[str | None] = Field(title="features.extractor")
    # pictures instead of stored features
    live: Fixed[LiveConfig | None] = Field(default=None, title="features.extractor")
    # the network that makes features of them in the model
    backbone: Fixed[GridConfig | None] = Field(default=None, title="features.extractor")
    family: Fixed[str] = Field(title="model.family")
    model: Fixed[dict[str, Any]] = Field(title="model.sizes")
    initial: Free[str | None] = None  # a model folder whose weights are taken over
    tokenizer: Free[str]
    max_tokens: Fixed[PositiveInt] = Field(title="model.max_tokens")
    answers: Fixed[tuple[str, ...]] = Field(default=(), title="benchmarks.vqa: answers")
    objectives: Fixed[dict[str, dict[str, Any]]] = Field(title="objectives")
    # the twin that never sees an image
    blind: Fixed[bool] = Field(default=False, title="training.blind_twin")
    seed: Fixed[int] = Field(default=0, ge=0, title="training.seed")
    training: TrainingConfig
    # The content of what the locations name, as a digest by the recipe's key: locations may be
    # moved or copied, or hold something else by now. None: nobody has looked.
    contents: Fixed[dict[str, str] | None] = Field(default=None, title="content")
    # Operations that one rank's device can make in a second, for the share that the model makes use
    # of (MFU); None: those of a GPU that is known.
    device_flops: Free[PositiveFloat | None] = None
    # how the model will write what it is scored by
    decoding: Free[Decoding | None] = None
    # what the model folder records beside the weights
    card: Free[dict[str, Any]] = Field(default_factory=dict)

    @field_validator("folder", "dataset", "initial", "tokenizer")
    @classmethod
    def _absolute(cls, location: str | None) -> str | None:
        """Ranks have working directories of their own."""
        return None if location is None else storage.absolute(location)

    def reproducibility_key(self) -> dict[str, Any]:
        """Returns what the loss curve is a function of, for comparing two runs.

        Absent are the settings that are free to change: where the run lies, and those that
        `TrainingConfig.reproducibility_key` leaves out.
        """
        own = {name for name in type(self).model_fields if name != "training"}
        free = {name for name in own if change_of(type(self), name) is Change.FREELY}
        key = self.model_dump(mode="json", exclude=free)
        key["training"] = self.training.reproducibility_key()
        return key


@dataclass(frozen=True)
class RankContext:
    """Where one rank runs. `device` is a torch device such as `cpu` or `cuda:0`."""

    rank: int
    world_size: int
    local_rank: int
    device: str


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended: `finished`, or `stopped` on request after writing a checkpoint."""

    state: Literal["finished", "stopped"]
    step: int
    steps: int
    loss: float  # of the last step logged, averaged over the global batch
    model_folder: str | None  # None while the run is not finished
    already_finished: bool = False  # True: the run was complete before, nothing was done
