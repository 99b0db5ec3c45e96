"""What a training run is: plain data that is saved, compared and sent to every rank."""

from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from pipeline import storage
from pipeline.config import Config
from pipeline.data.images import LiveConfig
from pipeline.data.loader import BatchConfig
from pipeline.errors import ConfigError
from pipeline.models.generation import Decoding
from pipeline.vision.grid import GridConfig

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

    steps: PositiveInt
    learning_rate: PositiveFloat = 1e-4  # the peak, reached at the end of the warm-up
    # Patterns of parameter names, as of files (`*.answer_head.*`). A name that several match takes
    # the factor of the last of them.
    learning_rate_factors: dict[str, PositiveFloat] = Field(default_factory=dict)
    freeze: tuple[str, ...] = ()  # patterns of parameters that are not trained
    # Micro-batches are cut by what they take: at most so many tokens and regions with their
    # padding, of texts of like length, and at most `micro_batch_size` samples. A sample that takes
    # more is one by itself. None: they have as many samples each, or one less.
    tokens_per_micro_batch: PositiveInt | None = None
    warmup_steps: int = Field(default=0, ge=0)
    decay: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = Field(default=0.01, ge=0)  # not applied to norms and biases
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: PositiveFloat = 1e-8
    clip_norm: float = Field(default=1.0, ge=0)  # 0: gradients are not clipped
    # auto: bf16 on a GPU, fp32 on a CPU
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    ema_decay: float | None = Field(default=None, gt=0, lt=1)  # per step; None: no moving average
    # What a step does whose loss or gradient is not a finite number: `stop` ends the run, `skip`
    # makes no update, `roll_back` returns to the last checkpoint and trains on without any of the
    # batches since.
    not_finite: Literal["stop", "skip", "roll_back"] = "stop"
    max_skips_in_a_row: PositiveInt = 5
    max_roll_backs: PositiveInt = 3
    zero_stage: Literal[0, 1, 2, 3] = 1
    recompute_layers: bool = False  # in the backward pass: less memory for a third more arithmetic
    evaluate_every_steps: PositiveInt | None = None  # on the held-out data; None: never
    # At most so many of its captions and of its questions, always the same; None: each once.
    evaluate_examples: PositiveInt | None = None
    best_by: str = "loss"  # the evaluated figure that tells a better model
    best_is: Literal["lowest", "highest"] = "lowest"
    patience: PositiveInt | None = None  # evaluations without a better one that end the run
    # The weights of the model folder: of the last step or of the best evaluation; as trained, or
    # their moving average. What is evaluated is the same as what is written.
    keep_best: bool = False
    model_weights: Literal["trained", "average"] = "trained"
    checkpoint_every_steps: PositiveInt = 500
    # A checkpoint is removed when none of these wants it.
    keep_checkpoints: int = Field(default=2, ge=2)  # two: a damaged one needs one to fall back to
    keep_best_checkpoints: int = Field(default=0, ge=0)  # by `best_by`, of those evaluated
    keep_every_steps: PositiveInt | None = None  # those at multiples of it
    keep_every_hours: PositiveFloat | None = None  # the first, and each so long after one kept
    log_every_steps: PositiveInt = 1
    loader_threads: PositiveInt = 2
    prefetch_steps: PositiveInt = 4  # steps collated ahead of the one that trains
    shuffle_window_shards: PositiveInt = 8
    timeout_seconds: PositiveInt = 300  # a rank that waits longer for the others ends the run
    # further DeepSpeed keys, merged into the ones built here
    deepspeed: dict[str, Any] = Field(default_factory=dict)

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

    def sequence(self) -> dict[str, Any]:
        """Returns the settings that the loss curve is a function of, but for rounding.

        Absent is how a run is spread over ranks, how often it saves and logs, and what it does if
        a loss is not finite.
        """
        absent = {
            "micro_batch_size",
            "tokens_per_micro_batch",
            "precision",
            "zero_stage",
            "recompute_layers",
            "not_finite",
            "max_skips_in_a_row",
            "max_roll_backs",
            "checkpoint_every_steps",
            "keep_checkpoints",
            "keep_best_checkpoints",
            "keep_every_steps",
            "keep_every_hours",
            "log_every_steps",
            "loader_threads",
            "prefetch_steps",
            "timeout_seconds",
            "deepspeed",
        }
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
    family `family`, `objectives` maps an objective's name to its config.
    """

    phase: str  # pretrain, finetune, blind
    folder: str  # RUN/<phase>: checkpoints/, metrics.jsonl, events.jsonl, model/, result.json
    dataset: str
    dataset_version: int
    split: str = "train"
    mixed_in: tuple[MixedIn, ...] = ()
    held_out_split: str | None = None  # what is evaluated on while training
    features: str | None  # the extractor's folder name; None: live features, or text only
    live: LiveConfig | None = None  # pictures instead of stored features
    backbone: GridConfig | None = None  # the network that makes features of them in the model
    family: str
    model: dict[str, Any]
    initial: str | None = None  # a model folder whose weights are taken over
    tokenizer: str
    max_tokens: PositiveInt
    answers: tuple[str, ...] = ()
    objectives: dict[str, dict[str, Any]]
    blind: bool = False  # the twin that never sees an image
    seed: int = Field(default=0, ge=0)
    training: TrainingConfig
    # Operations that one rank's device can make in a second, for the share that the model makes use
    # of (MFU); None: those of a GPU that is known.
    device_flops: PositiveFloat | None = None
    decoding: Decoding | None = None  # how the model will write what it is scored by
    # what the model folder records beside the weights
    card: dict[str, Any] = Field(default_factory=dict)

    @field_validator("folder", "dataset", "initial", "tokenizer")
    @classmethod
    def _absolute(cls, location: str | None) -> str | None:
        """Ranks have working directories of their own."""
        return None if location is None else storage.absolute(location)

    def sequence(self) -> dict[str, Any]:
        """Returns what the loss curve is a function of, for comparing two runs.

        Absent are the settings that may change between a run and its continuation: where it
        lies, and those that `TrainingConfig.sequence` leaves out.
        """
        spec = self.model_dump(mode="json")
        for name in (
            "phase",
            "folder",
            "tokenizer",
            "initial",
            "decoding",
            "card",
            "device_flops",
        ):
            del spec[name]
        spec["training"] = self.training.sequence()
        return spec


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
