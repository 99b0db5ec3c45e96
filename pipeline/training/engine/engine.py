"""The engine: the one module that meets DeepSpeed.

What is kept of a run is told in tensors that know no ZeRO stage and no world size: for each
parameter its fp32 weight and AdamW's two moments, whole, by name. The names are
`weight/<parameter>`, `exp_avg/<parameter>`, `exp_avg_sq/<parameter>`, `buffer/<buffer>` and, where
a moving average is kept, `average/<parameter>`.

Restoring reaches into optimizer internals of DeepSpeed 0.19.8, which has no public way to fill a
state that no step has made yet; every stage is tested on that version, and it is pinned.
"""

import contextlib
import importlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.errors import ConfigError, TrainingError
from pipeline.training.config import TrainingConfig
from pipeline.training.engine import async_io
from pipeline.training.engine.async_io import is_swapped
from pipeline.training.engine.known_keys import AskedFor, invalid
from pipeline.training.engine.optimizer import EMA_WEIGHTS, build_optimizer, freeze
from pipeline.training.engine.schedule import rate_factor
from pipeline.training.engine.swap_folder import SwapFolder
from pipeline.training.engine.swapped_state import SwappedState
from pipeline.training.spec import Environment

MOMENTS = ("exp_avg", "exp_avg_sq")
# What DeepSpeed's dynamic loss scaler goes by, which a run must go on with.
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Batch = Any  # what the module's forward takes: one micro-batch
ReadTensor = Callable[[str], Tensor]


def engine_config(
    config: TrainingConfig, environment: Environment, num_parameters: int
) -> dict[str, Any]:
    """Returns DeepSpeed's configuration, or raises ConfigError for an impossible combination."""
    precision = config.resolved_precision(environment.device)
    # A bucket is allocated whole: DeepSpeed's 500 million elements would be 2 GB for any model.
    # It must be a multiple of an alignment that depends on the world size.
    bucket = min(500_000_000, -(-num_parameters // 4096) * 4096)
    own = {
        # Its third number, the samples of a step, would be their product, which ours need not be:
        # what a micro-batch counts for, and which is a step's last, is said by `advance`.
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps(environment.world_size),
        "gradient_clipping": 0.0 if config.zero_stage == 0 else config.optimizer.clip_norm,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            **_swapping(config),
        },
        # torch's AdamW also where the optimizer is offloaded: DeepSpeed's own is compiled at start
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
    }
    return _merged(own, config.deepspeed)


def _swapping(config: TrainingConfig) -> dict[str, Any]:
    """Returns what DeepSpeed must be told to swap AdamW's state to files, if that is asked for."""
    zero = config.deepspeed.get("zero_optimization", {})
    if not is_swapped(zero):
        return {}
    # Of a group there are in memory at once weights, gradients and what AdamW keeps; and of its
    # neighbours too where they are read ahead or written behind.
    offload = zero["offload_optimizer"]
    groups = 1 + bool(offload.get("pipeline_read")) + bool(offload.get("pipeline_write"))
    buffers = groups * (2 + len(_kinds(config)))
    if offload.get("buffer_count", buffers) < buffers:
        raise ConfigError(
            "training.deepspeed.zero_optimization.offload_optimizer.buffer_count: this optimizer "
            f"needs {buffers}, found {offload['buffer_count']}; leave it out"
        )
    # With DeepSpeed's own size, a billion, most models are one group, in memory as a whole.
    return {"offload_optimizer": {"buffer_count": buffers}, "sub_group_size": 2**24}


def _kinds(config: TrainingConfig) -> tuple[str, ...]:
    """Returns the names of what AdamW keeps of each parameter."""
    return (*MOMENTS, EMA_WEIGHTS) if config.optimizer.ema_decay is not None else MOMENTS


class Engine:
    """A module in training: one forward and backward per micro-batch, one update per step.

    The module's forward takes a micro-batch and returns (loss, {objective: detached loss}), and
    uses every parameter inside it. A process group must exist; building an engine, `advance`,
    `states` and `weights` are collective: every rank calls them, in the same order.
    """

    def __init__(
        self,
        module: nn.Module,
        config: TrainingConfig,
        environment: Environment,
        step: int = 0,
        restored: ReadTensor | None = None,
        *,
        skipped: int = 0,
        loss_scale: Mapping[str, float] | None = None,
    ) -> None:
        """Starts at `step` steps done, `skipped` of them without an update.

        `restored` then gives the tensors of `states` by name, and `loss_scale` what
        `loss_scale` returned. Raises ConfigError for what this machine cannot run.
        """
        deepspeed = _import_deepspeed(environment.device)
        if restored is not None:
            # Before ZeRO takes the weights: stage 3 does not refresh its low-precision copies.
            _load(module, restored)
        module.to(environment.device)
        count = sum(parameter.numel() for parameter in module.parameters())
        self.config = engine_config(config, environment, count)
        if self.config["fp16"]["enabled"]:
            _require_halves("training.precision")
        async_io.require_ability(self.config["zero_optimization"], _async_io_builder)
        self.skipped = skipped  # steps whose update is not in the weights
        self._step = step
        self._training = config
        self._kinds = _kinds(config)
        self._accumulation = self.config["gradient_accumulation_steps"]
        self._stage = config.zero_stage
        self._clip_norm = config.optimizer.clip_norm or float("inf")
        self._swap_folder: SwapFolder | None = None
        freeze(module, config.optimizer.freeze)
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(module, config.optimizer),
            dist_init_required=False,
            config=_merged(self.config, {"zero_optimization": self._make_swap_folder()}),
        )
        self._swapped = SwappedState(self._engine.optimizer)
        self.device = torch.device(environment.device)
        self.dtype = _DTYPES[config.resolved_precision(environment.device)]
        self._make_state()
        if restored is not None:
            self._restore(restored)
        if self.dtype == torch.float16:
            # at the smallest scale DeepSpeed would end the process; what a run does is its policy's
            self._engine.optimizer.loss_scaler.raise_error_at_min_scale = False
        if loss_scale is not None and self.loss_scale() is not None:  # fp16 then and now
            for name, value in loss_scale.items():
                setattr(self._engine.optimizer.loss_scaler, name, value)

    def advance(
        self, micro_batches: Sequence[Batch], shares: Sequence[float] | None = None
    ) -> tuple[list[tuple[Tensor, Mapping[str, Tensor]]], float]:
        """Makes one update from this rank's micro-batches: at least one.

        `shares` are what each counts for in the mean of the ranks' sums; left out, all of a rank
        count alike, and one rank as much as another.
        Returns (loss, losses by objective) of each micro-batch, detached, and the norm of the whole
        gradient before clipping. If a loss on any rank or the gradient is not finite, the norm is
        not finite either, no update is made, and `skipped` counts the step.
        """
        if shares is None:
            shares = [1 / len(micro_batches)] * len(micro_batches)
        num_passes = self._num_passes(len(micro_batches))
        rate = self.learning_rate()
        for group in self._engine.basic_optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        losses = []
        norm: Any = 0.0
        for index in range(num_passes):
            last = index == num_passes - 1
            self._engine.set_gradient_accumulation_boundary(last)
            # Ranks make each pass together: one with fewer micro-batches repeats, for nothing.
            counts = index < len(micro_batches)
            loss, parts = self._engine(micro_batches[index if counts else 0])
            share = shares[index] if counts else 0.0
            if counts:
                losses.append((loss.detach(), parts))
            # A loss of infinity may have a finite gradient; times NaN it has none on any rank.
            whole = torch.stack([loss.detach(), *parts.values()]).isfinite().all()
            self._engine.backward(loss * torch.where(whole, share, math.nan), scale_wrt_gas=False)
            if self._stage == 0 and last:
                # DeepSpeed would clip here as well, and throw the norm away.
                parameters = self._engine.module.parameters()
                norm = float(nn.utils.clip_grad_norm_(parameters, self._clip_norm))
                if not math.isfinite(norm):
                    self._engine.module.zero_grad(set_to_none=True)  # AdamW leaves these alone
        with self._swapped.updating():
            self._engine.step()
        if self._stage:
            norm = float(self._engine.get_global_grad_norm())  # infinite if no update was made
        self._step += 1
        self.skipped += not math.isfinite(norm)
        return losses, norm

    def _num_passes(self, mine: int) -> int:
        """Returns the micro-batches of the rank that has most."""
        if self._training.loading.tokens_per_micro_batch is None:
            if mine > self._accumulation:
                raise TrainingError(
                    f"a step has up to {self._accumulation} micro-batches on a rank, found {mine}"
                )
            return int(self._accumulation)
        most = torch.tensor(mine, device=self.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most)

    def learning_rate(self) -> float:
        """Returns the rate of the next update, where no factor changes it."""
        # A function of the step, so there is no scheduler state to keep.
        return self._training.optimizer.learning_rate * rate_factor(
            self._training.schedule, self._training.steps, self._step
        )

    def loss_scale(self) -> dict[str, float] | None:
        """Returns the state of fp16's dynamic loss scale: plain numbers; None without one."""
        if self.dtype != torch.float16 or not self._engine.optimizer.loss_scaler.dynamic:
            return None
        scaler = self._engine.optimizer.loss_scaler
        return {name: getattr(scaler, name) for name in SCALER}

    def can_lower_loss_scale(self) -> bool:
        """Whether fp16's next step is made with less risk of too large a gradient."""
        if self.loss_scale() is None:
            return False
        scaler = self._engine.optimizer.loss_scaler
        return bool(scaler.cur_scale > scaler.min_scale)

    @contextlib.contextmanager
    def evaluating(self, ema: bool) -> Iterator[nn.Module]:
        """Yields the module in evaluation mode, with the moving average for weights if asked.

        Inside, no gradients are recorded; afterwards training goes on as if nothing had been.
        """
        module: nn.Module = self._engine.module
        module.eval()
        try:
            with torch.no_grad(), self._using_ema_weights() if ema else contextlib.nullcontext():
                yield module
        finally:
            module.train()

    def states(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every tensor of the state, whole and in fp32, in the same order on every rank.

        A yielded tensor is valid until the next one is asked for; keep a copy, not the tensor.
        """
        self._link_moments()
        with self._state_access():
            for name, parameter in self._parameters():
                yield f"weight/{name}", self._weight(parameter)
                if parameter.requires_grad:
                    for kind in self._kinds:
                        yield f"{kind}/{name}", self._optimizer_state(parameter, kind)
        for name, buffer in _persistent_buffers(self._engine.module):
            yield f"buffer/{name}", buffer.detach()

    def weights(self, ema: bool = False) -> dict[str, Tensor]:
        """Returns the module's state dict in fp32 on the CPU; every rank calls, rank 0 keeps it.

        `ema` gives the weights' moving average. Other ranks get an empty dict.
        """
        self._link_moments()
        weights = {}
        with self._state_access():
            for name, parameter in self._parameters():
                if ema and parameter.requires_grad:
                    weight = self._optimizer_state(parameter, EMA_WEIGHTS)
                else:
                    weight = self._weight(parameter)
                if torch.distributed.get_rank() == 0:
                    weights[name] = weight.detach().cpu().clone()
        if torch.distributed.get_rank() == 0:
            for name, buffer in _persistent_buffers(self._engine.module):
                weights[name] = buffer.detach().cpu().clone()
        return weights

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the module, and removes what was swapped to files."""
        self._engine.destroy()
        if self._swap_folder is not None:
            self._swap_folder.close()

    def _make_swap_folder(self) -> dict[str, Any]:
        """Makes this process's folder, if one is wanted; returns what DeepSpeed is told of it."""
        zero = self.config["zero_optimization"]
        if not is_swapped(zero):
            return {}
        self._swap_folder = SwapFolder(Path(zero["offload_optimizer"]["nvme_path"]))
        async_io.load(_async_io_builder(), self._swap_folder.path)
        return {"offload_optimizer": {"nvme_path": str(self._swap_folder.path)}}

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Returns the parameters by name, those together that are swapped in together."""
        named = list(self._engine.module.named_parameters())
        if self._stage < 3:
            return named
        return sorted(named, key=lambda item: self._swapped.group_of(item[1]))

    @contextlib.contextmanager
    def _state_access(self) -> Iterator[None]:
        """Lets stage 3's state be read, and written; training goes on after it."""
        try:
            yield
        finally:
            if self._stage == 3:
                self._swapped.release()

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed import zero
        from deepspeed.utils import safe_get_full_fp32_param

        if self._stage == 3:
            if parameter.requires_grad:
                return self._whole(parameter, "weight")
            with zero.GatheredParameters([parameter]):
                return parameter.detach().float().clone()
        if not parameter.requires_grad or self._stage == 0:
            return parameter.detach().float()
        whole: Tensor = safe_get_full_fp32_param(parameter)
        return whole.detach()

    def _optimizer_state(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """Returns a moment or the moving average of a parameter, whole."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if self._stage == 3:
            return self._whole(parameter, kind)
        if self._stage == 0:
            kept: Tensor = self._engine.basic_optimizer.state[parameter][kind]
            return kept.detach()
        whole: Tensor = safe_get_full_optimizer_state(parameter, kind)
        return whole.detach()

    def _whole(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """Gathers what stage 3 has of a parameter from all ranks."""
        part = self._swapped.part(parameter, kind)
        whole: Tensor = self._engine.optimizer._fp32_state_allgather(parameter, part)
        return whole

    @contextlib.contextmanager
    def _using_ema_weights(self) -> Iterator[None]:
        """Puts the moving average into the weights that the forward pass reads."""
        from deepspeed import zero

        self._link_moments()
        trainable = [parameter for _, parameter in self._parameters() if parameter.requires_grad]
        if self._stage < 3:
            before = [parameter.detach().clone() for parameter in trainable]
            for parameter in trainable:
                parameter.copy_(self._optimizer_state(parameter, EMA_WEIGHTS))
            try:
                yield
            finally:
                for parameter, weight in zip(trainable, before, strict=True):
                    parameter.copy_(weight)
            return

        def fill(read: Callable[[nn.Parameter], Tensor]) -> None:
            with self._state_access():
                for parameter in trainable:
                    whole = read(parameter)
                    with zero.GatheredParameters([parameter], modifier_rank=0):
                        parameter.copy_(whole)

        fill(lambda parameter: self._optimizer_state(parameter, EMA_WEIGHTS))
        try:
            yield
        finally:
            fill(self._weight)  # the low-precision copies are these, rounded

    def _make_state(self) -> None:
        """Gives AdamW the state that it would make at its first update."""
        inner = self._engine.basic_optimizer
        updates = float(self._step - self.skipped)
        with self._state_access():
            for partition in self._partitions():
                inner.state[partition] = {
                    "step": torch.tensor(updates, device=partition.device),
                    **{moment: torch.zeros_like(partition) for moment in MOMENTS},
                }
                if EMA_WEIGHTS in self._kinds:
                    inner.state[partition][EMA_WEIGHTS] = partition.detach().clone()

    def _partitions(self) -> Iterator[nn.Parameter]:
        """Yields what AdamW updates; of stage 3 one is in memory, to be written, at a time."""
        if self._stage == 3:
            for index in range(len(self._engine.optimizer.fp32_partitioned_groups_flat)):
                yield self._swapped.hold(index, changes=True)
        else:
            for group in self._engine.basic_optimizer.param_groups:
                yield from group["params"]

    def _restore(self, restored: ReadTensor) -> None:
        self._link_moments()
        with self._state_access():
            for name, parameter in self._parameters():
                if parameter.requires_grad:
                    for kind in ("weight", *self._kinds):
                        self._set(parameter, kind, restored(f"{kind}/{name}"))
        if self._stage in (1, 2):
            self._engine.optimizer.update_lp_params()
        self._engine.global_steps = self._step

    def _link_moments(self) -> None:
        """Makes stages 1 and 2 find each parameter's moments in their flat partitions.

        DeepSpeed does so once, after the first group's first update, when the groups after it
        have no moments yet.
        """
        if self._stage in (1, 2):
            wrapper = self._engine.optimizer
            wrapper._hp_optimizer_states_linked = False
            wrapper._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        """Writes this rank's part of a whole fp32 tensor."""
        from deepspeed import utils

        value = value.to(self.device)
        if self._stage == 0:
            if kind != "weight":
                self._engine.basic_optimizer.state[parameter][kind].copy_(value)
        elif self._stage == 3:
            # Stage 3 pads a parameter to equal parts; its setter of whole tensors forgets that.
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
            padded = nn.functional.pad(value.flatten(), (0, size * world_size - value.numel()))
            mine = padded.narrow(0, rank * size, size)
            self._swapped.part(parameter, kind, changes=True).copy_(mine)
        elif kind == "weight":
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, kind)


def _load(module: nn.Module, restored: ReadTensor) -> None:
    """Copies the weights and buffers of a state into a module that no engine holds yet."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(restored(f"weight/{name}"))
        for name, buffer in _persistent_buffers(module):
            buffer.copy_(restored(f"buffer/{name}"))


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    kept = module.state_dict(keep_vars=True)
    for name, buffer in module.named_buffers():
        if name in kept:
            yield name, buffer


def require_precision(config: TrainingConfig, environment: Environment, key: str) -> None:
    """Raises ConfigError, naming `key`, if this machine cannot compute in the config's precision.

    DeepSpeed is imported only if that is in doubt.
    """
    if config.precision == "fp16" and not environment.device.startswith("cuda"):
        _import_deepspeed(environment.device)
        _require_halves(key)


def _require_halves(key: str) -> None:
    """Refuses at once what would fail later, and less clearly."""
    from deepspeed.accelerator import get_accelerator

    # Of CPUs those can that have instructions for it (AVX512-FP16, AMX-FP16).
    if not get_accelerator().is_fp16_supported():
        raise ConfigError(f"{key}: fp16 needs a GPU, or a CPU that computes in halves; use bf16")


def require_swapping(config: TrainingConfig, environment: Environment) -> None:
    """Raises ConfigError if optimizer state is to be in files and cannot be on this machine.

    DeepSpeed is imported only if it is to be, and nothing is compiled yet.
    """

    def builder() -> Any:
        _import_deepspeed(environment.device)
        return _async_io_builder()

    zero = engine_config(config, environment, num_parameters=1)["zero_optimization"]
    async_io.require_ability(zero, builder)


def require_known_keys(config: TrainingConfig, environment: Environment, key: str) -> None:
    """Raises ConfigError if `config.deepspeed`, which `key` names, is not what DeepSpeed reads."""
    if not config.deepspeed:
        return
    _import_deepspeed(environment.device)
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    settings = AskedFor(engine_config(config, environment, num_parameters=1))
    try:
        DeepSpeedConfig(settings)
    except ValidationError as error:
        faults = invalid(error, config.deepspeed, DeepSpeedConfigModel)
    except (DeepSpeedConfigError, AssertionError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{key}: DeepSpeed refuses these settings: {error}") from error
    else:
        faults = settings.not_asked_for()
    if faults:
        raise ConfigError("\n".join(f"{key}.{fault}" for fault in faults))


def _async_io_builder() -> Any:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder()


def _merged(own: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `own` with the keys of `more` put in, mapping by mapping."""
    result = dict(own)
    for key, value in more.items():
        below = result.get(key)
        both = isinstance(below, dict) and isinstance(value, Mapping)
        result[key] = _merged(below, value) if both and below is not None else value
    return result


def _import_deepspeed(device: str) -> Any:
    """Imports DeepSpeed for a device: quietly, and without compiling anything at start."""
    if not device.startswith("cuda"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed calls collectives by names that torch has renamed, at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is dep", FutureWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime"
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed fills this table when it is first read, by compiling and linking test programs,
    # and then builds shared-memory collectives (a minute, once per machine). gloo needs neither.
    deepspeed.ops.__compatible_ops__ = {}
    # Its Muon optimizer, which it loads to tell that ours is another, is decorated with
    # torch.compile, and loading that compiler takes two seconds of every start.
    from deepspeed.runtime import compiler

    compile_now = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_now
    return deepspeed
