"""The settings of a training phase, in the groups that a recipe gives them in.

A run records those that its loss curve is a function of, and is compared with them when it goes on
(`pipeline.training.continuation`).
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipeline.config import (
    Change,
    Config,
    Fixed,
    Free,
    OnRequest,
    change_of,
    selected,
    settings,
)
from pipeline.data.load.loader import BatchConfig
from pipeline.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]

_OWN_DEEPSPEED_KEYS = {  # DeepSpeed's name -> the key of ours that decides it
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size and micro_batch_size",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16.enabled": "precision",
    "fp16.enabled": "precision",
    "data_types": "precision",
    "zero_optimization.stage": "zero_stage",
}


class OptimizerConfig(Config):
    """How AdamW updates the weights."""

    learning_rate: OnRequest[PositiveFloat] = Field(
        default=1e-4, description="the peak, reached at the end of the warm-up"
    )
    learning_rate_factors: OnRequest[dict[str, PositiveFloat]] = Field(
        default_factory=dict,
        description="what the rate of some parameters is multiplied with, by patterns of their "
        "names, as of files (`*.answer_head.*`); a name that several match takes the factor of "
        "the last of them",
    )
    freeze: Fixed[tuple[str, ...]] = Field(
        default=(), description="patterns of the names of parameters that are not trained"
    )
    weight_decay: OnRequest[float] = Field(
        default=0.01, ge=0, description="decoupled; not applied to norms and biases"
    )
    betas: OnRequest[tuple[float, float]] = Field(
        default=(0.9, 0.999), description="decay of the gradient's first and second moment"
    )
    epsilon: OnRequest[PositiveFloat] = Field(
        default=1e-8, description="added to the root of the second moment"
    )
    clip_norm: OnRequest[float] = Field(
        default=1.0, ge=0, description="the gradient's largest norm; 0: it is not clipped"
    )
    ema_decay: Fixed[float | None] = Field(
        default=None,
        gt=0,
        lt=1,
        description="per step, of the weights' exponential moving average; null: there is none",
    )


class ScheduleConfig(Config):
    """How the learning rate goes over the steps."""

    warmup_steps: OnRequest[int] = Field(
        default=0, ge=0, description="steps in which the rate rises linearly to its peak"
    )
    decay: OnRequest[Literal["linear", "cosine", "constant"]] = Field(
        default="linear", description="how the rate falls from the peak to the last step"
    )


class CheckpointsConfig(Config):
    """When checkpoints are written, and which are kept: one goes when no rule wants it."""

    every_steps: Free[PositiveInt] = Field(default=500, description="steps between two checkpoints")
    keep_last: Free[int] = Field(
        default=2,
        ge=2,
        description="the newest that are kept: two, for a damaged one needs one to fall back to",
    )
    keep_best: Free[int] = Field(
        default=0, ge=0, description="the best that are kept, by `evaluation.best_by`"
    )
    keep_every_steps: Free[PositiveInt | None] = Field(
        default=None, description="those at multiples of it are kept; null: none for that"
    )
    keep_every_hours: Free[PositiveFloat | None] = Field(
        default=None,
        description="the first is kept, and each so long after one kept; null: none for that",
    )


class EvaluationConfig(Config):
    """How the model is evaluated on the held-out split while it trains."""

    every_steps: OnRequest[PositiveInt | None] = Field(
        default=None, description="steps between two evaluations; null: there are none"
    )
    examples: OnRequest[PositiveInt | None] = Field(
        default=None,
        description="at most so many captions and so many questions, always the same; null: each "
        "of the split once",
    )
    best_by: OnRequest[str] = Field(
        default="loss", description="the evaluated figure that tells a better model"
    )
    best_is: OnRequest[Literal["lowest", "highest"]] = Field(
        default="lowest", description="which value of that figure is the best"
    )
    patience: OnRequest[PositiveInt | None] = Field(
        default=None,
        description="evaluations in a row without a better one that end the run; null: none do",
    )
    restore_best: OnRequest[bool] = Field(
        default=False,
        description="whether the model folder gets the weights of the best evaluation in place of "
        "the last step's",
    )


class LoadingConfig(Config):
    """How samples are read, in which order, and divided into micro-batches."""

    threads: Free[PositiveInt] = Field(
        default=2, description="threads of a rank that read and decode samples"
    )
    prefetch_steps: Free[PositiveInt] = Field(
        default=4, description="steps collated ahead of the one that trains"
    )
    shuffle_window_shards: Fixed[PositiveInt] = Field(
        default=8, description="shards whose samples are shuffled among each other"
    )
    group_by_length: OnRequest[bool] = Field(
        default=False,
        description="whether a rank divides its samples of a step into micro-batches by the "
        "length of their texts",
    )
    tokens_per_micro_batch: Free[PositiveInt | None] = Field(
        default=None,
        description="micro-batches take at most so many tokens and regions with their padding, of "
        "texts of like length, and at most `micro_batch_size` samples; a sample that takes more "
        "is one by itself; null: they have as many samples each, or one less",
    )


class TrainingConfig(BatchConfig):
    """How one phase is trained. Counts are optimizer steps."""

    moved: ClassVar[Mapping[str, str]] = {
        "learning_rate": "optimizer.learning_rate",
        "learning_rate_factors": "optimizer.learning_rate_factors",
        "freeze": "optimizer.freeze",
        "weight_decay": "optimizer.weight_decay",
        "betas": "optimizer.betas",
        "epsilon": "optimizer.epsilon",
        "clip_norm": "optimizer.clip_norm",
        "ema_decay": "optimizer.ema_decay",
        "warmup_steps": "schedule.warmup_steps",
        "decay": "schedule.decay",
        "checkpoint_every_steps": "checkpoints.every_steps",
        "keep_checkpoints": "checkpoints.keep_last",
        "keep_best_checkpoints": "checkpoints.keep_best",
        "keep_every_steps": "checkpoints.keep_every_steps",
        "keep_every_hours": "checkpoints.keep_every_hours",
        "evaluate_every_steps": "evaluation.every_steps",
        "evaluate_examples": "evaluation.examples",
        "best_by": "evaluation.best_by",
        "best_is": "evaluation.best_is",
        "patience": "evaluation.patience",
        "keep_best": "evaluation.restore_best",
        "loader_threads": "loading.threads",
        "prefetch_steps": "loading.prefetch_steps",
        "shuffle_window_shards": "loading.shuffle_window_shards",
        "group_by_length": "loading.group_by_length",
        "tokens_per_micro_batch": "loading.tokens_per_micro_batch",
    }

    steps: OnRequest[PositiveInt] = Field(description="updates of the weights in all")
    precision: OnRequest[Literal["auto", "fp32", "bf16", "fp16"]] = Field(
        default="auto", description="of the arithmetic; auto: bf16 on a GPU, fp32 on a CPU"
    )
    model_weights: OnRequest[Literal["trained", "average"]] = Field(
        default="trained",
        description="which weights are evaluated, and written to the model folder: as trained, or "
        "their exponential moving average",
    )
    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(), description="how AdamW updates the weights"
    )
    schedule: ScheduleConfig = Field(
        default=ScheduleConfig(), description="how the learning rate goes over the steps"
    )
    loading: LoadingConfig = Field(
        default=LoadingConfig(),
        description="how samples are read, in which order, and divided into micro-batches",
    )
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(),
        description="how the model is evaluated on the held-out split while it trains",
    )
    checkpoints: CheckpointsConfig = Field(
        default=CheckpointsConfig(), description="when checkpoints are written, and which are kept"
    )
    not_finite: Free[Literal["stop", "skip", "roll_back"]] = Field(
        default="stop",
        description="what a step does whose loss or gradient is not a finite number: `stop` ends "
        "the run, `skip` makes no update, `roll_back` returns to the last checkpoint and trains "
        "on without any of the batches since",
    )
    max_skips_in_a_row: Free[PositiveInt] = Field(
        default=5, description="with `not_finite=skip`: one more ends the run"
    )
    max_roll_backs: Free[PositiveInt] = Field(
        default=3, description="with `not_finite=roll_back`: one more ends the run"
    )
    zero_stage: Free[Literal[0, 1, 2, 3]] = Field(
        default=1,
        description="what ranks have a part of each in place of the whole: 1 the optimizer's "
        "state, 2 also gradients, 3 also weights (ZeRO)",
    )
    recompute_layers: Free[bool] = Field(
        default=False,
        description="whether the backward pass computes layers again: less memory for a third "
        "more arithmetic",
    )
    log_every_steps: Free[PositiveInt] = Field(
        default=1, description="steps between two lines of metrics.jsonl"
    )
    timeout_seconds: Free[PositiveInt] = Field(
        default=300, description="a rank that waits longer for the others ends the run"
    )
    deepspeed: Free[dict[str, Any]] = Field(
        default_factory=dict, description="further DeepSpeed keys, merged into those built here"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.micro_batch_size > self.global_batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} is more than "
                f"global_batch_size={self.global_batch_size}"
            )
        if self.loading.tokens_per_micro_batch is not None and self.loading.group_by_length:
            raise ValueError(
                "loading.tokens_per_micro_batch groups by length; leave loading.group_by_length out"
            )
        if self.schedule.warmup_steps > self.steps:
            raise ValueError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} is more than "
                f"steps={self.steps}"
            )
        if self.zero_stage == 0 and self.precision in ("bf16", "fp16"):
            raise ValueError(zero_0_refusal(self.precision))
        if self.model_weights == "average" and self.optimizer.ema_decay is None:
            raise ValueError(
                "model_weights=average needs an average to write: set optimizer.ema_decay"
            )
        by_evaluations = {
            "evaluation.patience": self.evaluation.patience,
            "evaluation.restore_best": self.evaluation.restore_best,
            "checkpoints.keep_best": self.checkpoints.keep_best,
        }
        for key, value in by_evaluations.items():
            if value and self.evaluation.every_steps is None:
                raise ValueError(f"{key} goes by evaluations: set evaluation.every_steps")
        self._check_deepspeed()
        return self

    def _check_deepspeed(self) -> None:
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

    def reproducibility_key(self) -> dict[str, Any]:
        """Returns the settings that the loss curve is a function of, but for rounding.

        Absent is how a run is spread over ranks, how often it saves and logs, what it does if a
        loss is not finite, and how it is evaluated if it is not.
        """
        absent = {"evaluation.examples", "evaluation.best_by", "evaluation.best_is"}
        if self.evaluation.every_steps is not None:
            absent = set()
        keys = [
            key
            for key in settings(type(self))
            if change_of(type(self), key) is not Change.FREELY and key not in absent
        ]
        return selected(self.model_dump(mode="json"), keys)

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
