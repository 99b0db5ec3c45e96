"""The training spec: plain data that is saved, compared and sent to every rank."""

from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from pipeline import storage
from pipeline.config import Change, Config, Fixed, Free, OnRequest, change_of
from pipeline.data.load.loader import BatchConfig
from pipeline.data.read.images import LiveConfig
from pipeline.errors import ConfigError
from pipeline.models.generation import Decoding
from pipeline.vision.extractors.grid import GridConfig

Precision = Literal["fp32", "bf16", "fp16"]

_OWN_DEEPSPEED_KEYS = {  # DeepSpeed's name -> the key of ours that decides it
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size and micro_batch_size",
    "gradient_clipping": "clip_norm",
    "optimizer": "learning_rate, betas, epsilon and weight_decay",
    "scheduler": "warmup_steps and decay",
    "bf16.enabled": "precision",
    "fp16.enabled": "precision",
    "data_types": "precision",
    "zero_optimization.stage": "zero_stage",
}


class TrainingConfig(BatchConfig):
    """How one phase is trained. Counts are optimizer steps."""

    steps: OnRequest[PositiveInt]
    learning_rate: OnRequest[PositiveFloat] = 1e-4  # the peak, reached at the end of the warm-up
    # Patterns of parameter names, as of files (`*.answer_head.*`). A name that several match takes
    # the factor of the last of them.
    learning_rate_factors: OnRequest[dict[str, PositiveFloat]] = Field(default_factory=dict)
    freeze: Fixed[tuple[str, ...]] = ()  # patterns of parameters that are not trained
    # Micro-batches are cut by what they take: at most so many tokens and regions with their
    # padding, of texts of like length, and at most `micro_batch_size` samples. A sample that takes
    # more is one by itself. None: they have as many samples each, or one less.
    tokens_per_micro_batch: Free[PositiveInt | None] = None
    warmup_steps: OnRequest[int] = Field(default=0, ge=0)
    decay: OnRequest[Literal["linear", "cosine", "constant"]] = "linear"
    weight_decay: OnRequest[float] = Field(default=0.01, ge=0)  # not applied to norms and biases
    betas: OnRequest[tuple[float, float]] = (0.9, 0.999)
    epsilon: OnRequest[PositiveFloat] = 1e-8
    clip_norm: OnRequest[float] = Field(default=1.0, ge=0)  # 0: gradients are not clipped
    # auto: bf16 on a GPU, fp32 on a CPU
    precision: OnRequest[Literal["auto", "fp32", "bf16", "fp16"]] = "auto"
    # per step; None: no moving average
    ema_decay: Fixed[float | None] = Field(default=None, gt=0, lt=1)
    # What a step does whose loss or gradient is not a finite number: `stop` ends the run, `skip`
    # makes no update, `roll_back` returns to the last checkpoint and trains on without any of the
    # batches since.
    not_finite: Free[Literal["stop", "skip", "roll_back"]] = "stop"
    max_skips_in_a_row: Free[PositiveInt] = 5
    max_roll_backs: Free[PositiveInt] = 3
    zero_stage: Free[Literal[0, 1, 2, 3]] = 1
    # in the backward pass: less memory for a third more arithmetic
    recompute_layers: Free[bool] = False
    evaluate_every_steps: OnRequest[PositiveInt | None] = None  # on the held-out data; None: never
    # At most so many of its captions and of its questions, always the same; None: each once.
    evaluate_examples: OnRequest[PositiveInt | None] = None
    best_by: OnRequest[str] = "loss"  # the evaluated figure that tells a better model
    best_is: OnRequest[Literal["lowest", "highest"]] = "lowest"
    # evaluations without a better one that end the run
    patience: OnRequest[PositiveInt | None] = None
    # The weights of the model folder: of the last step or of the best evaluation; as trained, or
    # their moving average. What is evaluated is the same as what is written.
    keep_best: OnRequest[bool] = False
    model_weights: OnRequest[Literal["trained", "average"]] = "trained"
    checkpoint_every_steps: Free[PositiveInt] = 500
    # A checkpoint is removed when none of these wants it.
    # two: a damaged one needs one to fall back to
    keep_checkpoints: Free[int] = Field(default=2, ge=2)
    keep_best_checkpoints: Free[int] = Field(default=0, ge=0)  # by `best_by`, of those evaluated
    keep_every_steps: Free[PositiveInt | None] = None  # those at multiples of it
    # the first, and each so long after one kept
    keep_every_hours: Free[PositiveFloat | None] = None
    log_every_steps: Free[PositiveInt] = 1
    loader_threads: Free[PositiveInt] = 2
    prefetch_steps: Free[PositiveInt] = 4  # steps collated ahead of the one that trains
    shuffle_window_shards: Fixed[PositiveInt] = 8
    timeout_seconds: Free[PositiveInt] = 300  # a rank that waits longer for the others ends the run
    # further DeepSpeed keys, merged into the ones built here
    deepspeed: Free[dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.micro_batch_size > self.global_batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} is more than "
                f"global_batch_size={self.global_batch_size}"
            )
        if self.tokens_per_micro_batch is not None and self.group_by_length:
            raise ValueError("tokens_per_micro_batch groups by length; leave group_by_length out")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} is more than steps={self.steps}")
        if self.zero_stage == 0 and self.precision in ("bf16", "fp16"):
            raise ValueError(zero_0_refusal(self.precision))
        if self.model_weights == "average" and self.ema_decay is None:
            raise ValueError("model_weights=average needs an average to write: set ema_decay")
        for key in ("patience", "keep_best", "keep_best_checkpoints"):
            if getattr(self, key) and self.evaluate_every_steps is None:
                raise ValueError(f"{key} goes by evaluations: set evaluate_every_steps")
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError(f"deepspeed.zero_optimization: expected a mapping, found {zero!r}")
        for key, stage in (("offload_optimizer", 1), ("offload_param", 3)):
            if not isinstance(zero.get(key, {}), dict | None):
                raise ValueError(
                    f"deepspeed.zero_optimization.{key}: expected a mapping, found {zero[key]!r}"
                )
            if key in zero and self.zero_stage < stage:
                raise ValueError(
                    f"deepspeed.zero_optimization.{key} has no effect with "
                    f"zero_stage={self.zero_stage}; use {stage} or more"
                )
        for key, ours in _OWN_DEEPSPEED_KEYS.items():
            node: Any = self.deepspeed
            for part in key.split("."):
                node = node.get(part) if isinstance(node, dict) else None
            if node is not None:
                raise ValueError(f"deepspeed.{key} is decided by {ours}; set that instead")
        return self

    def reproducibility_key(self) -> dict[str, Any]:
        """Returns the settings that the loss curve is a function of, but for rounding.

        Absent is how a run is spread over ranks, how often it saves and logs, what it does if a
        loss is not finite, and how it is evaluated if it is not.
        """
        absent = _free(type(self))
        if self.evaluate_every_steps is None:
            absent |= {"evaluate_examples", "best_by", "best_is"}
        return self.model_dump(mode="json", exclude=absent)

    def resolved_precision(self, device: str) -> Precision:
        """Returns the precision on a device (`cpu`, `cuda:0`), or raises ConfigError."""
        if self.precision != "auto":
            return self.precision
        if device.startswith("cuda"):
            if self.zero_stage == 0:
                raise ConfigError(f"precision=auto on a GPU: {zero_0_refusal('bf16')}")
            return "bf16"
        return "fp32"


def zero_0_refusal(precision: str) -> str:
    """Says why ZeRO stage 0 is run in fp32 only."""
    return (
        f"zero_stage=0 with precision={precision} is refused: DeepSpeed then updates with another "
        "optimizer, which in bf16 strays from fp32 by 2e-2 in five steps; use zero_stage=1 (it "
        "costs no more on one rank) or precision=fp32"
    )


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
        spec = self.model_dump(mode="json", exclude=_free(type(self)))
        spec["training"] = self.training.reproducibility_key()
        return spec


def _free(config: type[Config]) -> set[str]:
    """Names the settings of a config that may change with no word said."""
    fields = (name for name in config.model_fields if name != "training")
    return {name for name in fields if change_of(config, name) is Change.FREELY}


@dataclass(frozen=True)
class Environment:
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
